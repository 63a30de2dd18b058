"""Scaling: which steps are started and what efficiency is made of them; once, long, with real ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rae_scale.bench.record import Measure, Record, Row
from rae_scale.bench.record_report import to_markdown, write_chart
from rae_scale.bench.scaling import SCALING, arguments, bench_scaling, last_words
from rae_scale.bench.session import Session
from rae_scale.bench.setup import StepSetup
from tests.bench.made_up import record

CPU = torch.device("cpu")
ALONE = Session(CPU, 1)
SETUP = StepSetup("dit-tiny", 4, overrides=("engine.name=fsdp2",))


class Launched:
    """Steps that take as long as one is told: `seconds` by (ranks, images of the step)."""

    def __init__(self, seconds: dict[tuple[int, int], float]) -> None:
        self.seconds = seconds
        self.commands: list[tuple[int, list[str]]] = []

    def __call__(self, ranks: int, given: Sequence[str], folder: Path) -> Record:
        self.commands.append((ranks, list(given)))
        batch = int([text for text in given if text.startswith("data.global_batch_size=")][-1].partition("=")[2])
        if (ranks, batch) not in self.seconds:
            return record(Row({}, {}, failed="out of memory"))
        time = self.seconds[ranks, batch]
        return record(Row({}, {}, {}, {"step": Measure(time, time, time, 3)}, {"images_per_s": batch / time}))


def test_weak_and_strong_scaling_and_their_efficiency(tmp_path: Path) -> None:
    launched = Launched({(1, 4): 1.0, (2, 8): 1.25, (4, 16): 2.0, (2, 4): 0.625})
    found = bench_scaling(SETUP, ALONE, ranks=[1, 2, 4], launch=launched, step_options=["--repeats=3"])
    assert [(row.varied["mode"], row.varied["ranks"], row.values.get("batch")) for row in found.rows] == [
        ("weak", 1, 4),
        ("weak", 2, 8),
        ("weak", 4, 16),
        ("strong", 1, 4),
        ("strong", 2, 4),
        ("strong", 4, None),
    ]
    assert [row.values.get("efficiency") for row in found.rows] == pytest.approx([1.0, 0.8, 0.5, 1.0, 0.8, None])
    assert found.rows[-1].failed == "out of memory"
    assert [row.facts["world_size"] for row in found.rows] == [1, 2, 4] * 2
    ranks, command = launched.commands[1]
    assert ranks == 2 and command[:2] == ["bench", "step"] and "--repeats=3" in command and "--device=cpu" in command
    assert "parallel.dp_shard=2" in command and "engine.name=fsdp2" in command
    assert "| mode weak, ranks 2 | 8 | 1250.0 |" in to_markdown(SCALING, found)
    write_chart(SCALING, found, tmp_path)
    assert (tmp_path / "scaling.png").is_file()


def test_other_axes_of_the_layout_multiply_the_ranks() -> None:
    setup = StepSetup("dit-tiny", 4, None, True, "qwen2-tiny", 8, ("engine.name=fsdp2", "parallel.dp_shard=2"))
    launched = Launched({(2, 4): 1.0, (4, 4): 0.5})
    found = bench_scaling(setup, ALONE, ranks=[1, 2], modes=["strong"], axis="tp", launch=launched)
    assert [ranks for ranks, _ in launched.commands] == [2, 4] == [row.varied["ranks"] for row in found.rows]
    assert [row.values["efficiency"] for row in found.rows] == [1.0, 1.0]


def test_the_command_line_makes_the_setup_again() -> None:
    setup = StepSetup("dit-tiny", 4, 64, overrides=("engine.name=fsdp2",))
    assert arguments(setup) == [
        "--model=dit-tiny",
        "--batch=4",
        "--llm=qwen2.5-1.5b",
        "engine.name=fsdp2",
        "--tokens=64",
    ]
    assert arguments(StepSetup("dit-tiny", 4, None, True, "qwen2-tiny", 9))[-2:] == ["--with-llm", "--text-tokens=9"]


def test_what_a_failed_rank_said_is_kept() -> None:
    output = "Traceback\nrae-scale: error (rank 0): parallel.tp=3 does not divide\nChildFailedError: \n====\n"
    assert last_words(output) == "rae-scale: error (rank 0): parallel.tp=3 does not divide"
    assert last_words("  File\nRuntimeError: NCCL\nx.ChildFailedError: y\n===") == "RuntimeError: NCCL"
    assert last_words("") == "it said nothing"


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"--ranks=4, but this machine has 2 GPU\(s\)"):
        bench_scaling(SETUP, Session(torch.device("cuda"), 1), ranks=[4])


@pytest.mark.long
@pytest.mark.dist
def test_real_ranks(tmp_path: Path) -> None:
    broken = SETUP.with_overrides(["model.name=dit-tiny"])
    found = bench_scaling(broken, ALONE, ranks=[1, 2], modes=["weak"], step_options=["--repeats=2", "--warm-up=1"])
    assert [row.failed for row in found.rows] == [None, None]
    assert [row.values["batch"] for row in found.rows] == [4, 8]
    assert all(row.measures["step"].median > 0 for row in found.rows)
