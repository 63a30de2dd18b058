"""The same loss curve from every engine and layout: one process, two under ZeRO-3, two or four under FSDP2."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny_world import TinyWorld, read_metrics, train_rank

from rae_scale.state import read_weights
from rae_scale.train import train

STEPS = 20
DP2 = {"parallel__dp_shard": 2}
ENGINES = {
    "zero": {"engine__name": "zero", "engine__zero_stage": 3, **DP2},
    "fsdp2": {"engine__name": "fsdp2", **DP2},
    "fsdp2-tp-sp": {"engine__name": "fsdp2", "parallel__tp": 2, "parallel__sp": 2},
}
CURVE = ("loss", "loss_flow", "loss_text", "loss_flow_bin_0")

pytestmark = pytest.mark.dist


def settings(engine: str) -> dict[str, Any]:
    if engine == "eager":
        # Four micro-batches in one process against two in each of two: sums do not care.
        return {"run__max_steps": STEPS, "data__micro_batch_size": 2}
    return {"run__max_steps": STEPS, "data__micro_batch_size": 2, **ENGINES[engine]}


@pytest.fixture(scope="module")
def reference(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("eager")
    train(world.config(folder, **settings("eager")))
    return read_metrics(folder)


@pytest.mark.parametrize("engine", ["zero", "fsdp2", pytest.param("fsdp2-tp-sp", marks=pytest.mark.long)])
def test_several_processes_give_the_curve_of_one(
    world: TinyWorld, decoder: str, tmp_path: Path, reference: list[dict[str, Any]], engine: str
) -> None:
    # With pictures on the way: drawing them with the EMA weights must leave the training as it was.
    pictures = {"run__sample_every": 10, "run__sample_prompts": ["a red picture"], "sampler__steps": 2}
    changes = {**settings(engine), **pictures, "optim__ema_decay": 0.9, "model__decoder__path": decoder}
    ranks = 4 if "parallel__tp" in changes else 2
    run_ranks(train_rank, ranks, tmp_path, args=(world.tree(tmp_path / "run", **changes),))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for ours, theirs in zip(lines, reference, strict=True):
        for name in CURVE:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours["step"], name)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), ours["step"]
        for name in ("images_per_second", "tokens_per_second"):
            assert ours[name] * ours["step_s"] == pytest.approx(theirs[name] * theirs["step_s"]), name
    pngs = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert pngs == ["step-00000010.png", "step-00000020.png"]


@pytest.mark.long
@pytest.mark.parametrize("accumulate", [True, False], ids=["micro-steps", "one-step"])
@pytest.mark.parametrize(
    "layout",
    [
        {"engine__name": "zero", "engine__zero_stage": 1, "parallel__dp_shard": 2},
        {"engine__name": "zero", "engine__zero_stage": 2, "parallel__dp_shard": 2},
        {"engine__name": "zero", "engine__zero_stage": 3, "parallel__dp_shard": 4},
        {"engine__name": "fsdp2", "parallel__dp_shard": 4},
        {"engine__name": "fsdp2", "parallel__dp_replicate": 2, "parallel__dp_shard": 2},
        {"engine__name": "fsdp2", "parallel__dp_shard": 2, "engine__activation_checkpointing": "full"},
        {"engine__name": "zero", "engine__zero_stage": 3, "parallel__tp": 2, "parallel__dp_shard": 2},
        {"engine__name": "zero", "engine__zero_stage": 3, "parallel__sp": 2, "parallel__dp_shard": 2},
    ],
    ids=[
        "zero1",
        "zero2",
        "zero3-4-ranks",
        "fsdp2-4-ranks",
        "fsdp2-hybrid",
        "fsdp2-recomputed",
        "zero3-tp",
        "zero3-sp",
    ],
)
def test_every_layout_gives_the_curve_of_one(
    world: TinyWorld, tmp_path: Path, reference: list[dict[str, Any]], layout: dict[str, Any], accumulate: bool
) -> None:
    ranks = math.prod(size for name, size in layout.items() if name.startswith("parallel__"))
    changes = {"run__max_steps": STEPS, **layout, **({"data__micro_batch_size": 1} if accumulate else {})}
    run_ranks(train_rank, ranks, tmp_path, args=(world.tree(tmp_path / "run", **changes),))
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == STEPS
    for ours, theirs in zip(lines, reference, strict=True):
        for name in CURVE:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours["step"], name)


def test_what_happens_to_one_rank_happens_to_all_and_another_layout_goes_on(world: TinyWorld, tmp_path: Path) -> None:
    # Position 13 is the sixth sample of step 2: rank 1 has it, in the first of its two micro-batches.
    changes = {**settings("zero"), "run__max_steps": 6, "run__keep_last": 9, "run__save_every": 1}
    run_ranks(train_rank, 2, tmp_path, args=(world.tree(tmp_path / "run", **changes), 13, 3))
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 1, 1]  # stopped before the step whose data were coming
    (entry,) = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert entry["step"] == 2 and len(entry["sample_ids"]) == 1
    before, after = (read_weights(tmp_path / "run" / "checkpoints" / f"step-0000000{n}") for n in (1, 2))
    assert all(torch.equal(before[name], after[name]) for name in before)

    train(world.config(tmp_path / "run", **settings("eager") | {"run__max_steps": 6}))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(tmp_path / "run")[-1]["skipped"] == 1
