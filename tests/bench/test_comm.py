"""Collectives, and with them everything that several ranks measure together: two gloo ranks, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks

from rae_scale.bench.checkpoint import bench_checkpoint
from rae_scale.bench.collectives import COLLECTIVES, groups_of, ledger_name
from rae_scale.bench.comm import COMM, bench_comm, estimate
from rae_scale.bench.record import Measure, Record, Row
from rae_scale.bench.record_report import to_markdown, write_chart
from rae_scale.bench.session import Session, open_session
from rae_scale.bench.setup import Step, StepSetup
from rae_scale.bench.step_report import bench_step
from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel import Mesh

CPU = torch.device("cpu")
PAYLOADS = [1000, 64 * 1024]
TWO = StepSetup("dit-tiny", 4, overrides=("engine.name=fsdp2", "parallel.dp_shard=2"))
WITH_LLM = StepSetup("dit-tiny", 2, None, True, "qwen2-tiny", 8, ("engine.name=fsdp2", "engine.precision=fp32"))
LAYOUTS = [(), ("parallel.dp_shard=1", "parallel.dp_replicate=2"), ("parallel.dp_shard=4",)]
SPLIT = [("parallel.tp=2",), ("parallel.sp=2",)]


def measure_on_a_rank(folder: str) -> dict[str, Any]:
    """Everything in one go: starting processes takes longer than all of it."""
    torch.set_num_threads(1)
    with open_session([ParallelConfig(dp_shard=4), ParallelConfig(dp_shard=2)], "cpu") as session:
        written: list[int] = []
        steps = bench_step(
            TWO,
            session,
            LAYOUTS,
            repeats=2,
            warm_up=1,
            small=True,
            after_row=lambda record: written.append(len(record.rows)),
        )
        comm = bench_comm(TWO, session, payloads=PAYLOADS, groups=["dp", "shard"], traffic=True, repeats=2, warm_up=1)
        checkpoint = bench_checkpoint(TWO, session, folder=Path(folder), files=2, repeats=1)
        slowest = session.slowest([1.0, 5.0] if session.rank else [2.0, 3.0])
    return {
        "steps": steps.to_json(),
        "comm": comm,
        "checkpoint": checkpoint.to_json(),
        "slowest": slowest,
        "written": written,
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    found = run_ranks(measure_on_a_rank, 2, tmp_path_factory.mktemp("ranks"), args=(str(folder),), timeout=200)
    assert not list(folder.iterdir()), "what was written is removed"
    return found


@pytest.mark.dist
def test_ranks_report_the_same_and_the_slowest_counts(ranks: list[dict[str, Any]]) -> None:
    assert [found["slowest"] for found in ranks] == [[2.0, 5.0]] * 2
    for name in ("steps", "checkpoint"):
        first, second = (found[name]["rows"] for found in ranks)
        assert [row["measures"] for row in first] == [row["measures"] for row in second]
    assert [found["written"] for found in ranks] == [[1, 2, 3], []]  # the main one alone writes


@pytest.mark.dist
def test_each_layout_of_two_ranks_is_stepped_and_another_says_why_not(ranks: list[dict[str, Any]]) -> None:
    rows = ranks[0]["steps"]["rows"]
    layouts = [row["facts"].get("layout") for row in rows]
    assert (layouts[0]["dp_shard"], layouts[1]["dp_replicate"]) == (2, 2)
    for row in rows[:2]:
        assert row["facts"]["world_size"] == 2 and row["measures"]["step"]["repeats"] == 2
        assert row["values"]["images_per_s"] == pytest.approx(4 / row["measures"]["step"]["median"])
    assert "the layout of 4 process(es), but 2 measure" in rows[2]["failed"]


def gradient_norm(setup: StepSetup, session: Session) -> float:
    """Of the step that is timed, once."""
    step = Step(setup, session.mesh(setup.config().parallel))
    step.engine.backward(step.forward(step.inputs(2, 0)), last=True)
    norm = step.engine.step(step.lrs).grad_norm
    step.engine.close()
    return norm


def split_norms() -> list[float]:
    with open_session([ParallelConfig(tp=2)], "cpu") as session:
        return [gradient_norm(WITH_LLM.with_overrides(layout), session) for layout in SPLIT]


@pytest.mark.dist
@pytest.mark.long
def test_a_step_of_split_layers_or_tokens_has_one_process_s_gradient(tmp_path: Path) -> None:
    alone = gradient_norm(WITH_LLM, Session(CPU, 1))
    for norms in run_ranks(split_norms, 2, tmp_path, timeout=200):
        assert norms == pytest.approx([alone, alone], rel=1e-4)


@pytest.mark.dist
def test_bandwidth_and_what_a_step_would_take(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    record: Record = ranks[0]["comm"]
    # dp and shard are the same two ranks.
    assert [(row.varied["collective"], row.varied["group"], row.varied["payload"]) for row in record.rows] == [
        (kind, "shard", payload) for kind in COLLECTIVES for payload in PAYLOADS
    ]
    for row in record.rows:
        assert row.values["payload"] == row.varied["payload"] and row.values["ranks"] == 2
        rate = row.values["payload"] / row.measures["time"].median / 1e9
        assert row.values["algorithm_gb_s"] == pytest.approx(rate)
        share = 1.0 if row.varied["collective"] == "all_reduce" else 0.5
        assert row.values["bus_gb_s"] == pytest.approx(share * rate)
    traffic = record.facts["traffic"]
    assert {"all_gather", "reduce_scatter"} <= {entry["collective"] for entry in traffic}
    assert all(entry["estimate_ms"] > 0 for entry in traffic if entry["collective"] in COLLECTIVES)
    assert "What one step sends" in to_markdown(COMM, record)
    write_chart(COMM, record, tmp_path)
    assert (tmp_path / "comm.png").is_file()


@pytest.mark.dist
def test_checkpoints_of_all_ranks_together(ranks: list[dict[str, Any]]) -> None:
    (row,) = ranks[0]["checkpoint"]["rows"]
    assert set(row["measures"]) == {"save", "plain", "stall", "saved", "verify", "load", "reshard"}
    assert row["facts"]["world_size"] == 2 and row["values"]["gigabytes"] > 0


def test_a_step_s_time_is_calls_at_the_smallest_and_bytes_at_the_largest() -> None:
    def measured(payload: int, median: float) -> Row:
        varied = {"collective": "all_gather", "group": "dp", "payload": payload}
        values = {"payload": payload, "algorithm_gb_s": payload / median / 1e9}
        return Row(varied, {}, {}, {"time": Measure(median, median, median, 1)}, values)

    traffic = [
        {"collective": "all_gather", "group": "dp", "calls": 3, "payload": 5_000_000},
        {"collective": "all_reduce", "group": "dp", "calls": 1, "payload": 8},
    ]
    found = estimate([measured(1_000_000, 0.01), measured(1000, 0.001)], traffic)
    assert found[0]["estimate_ms"] == pytest.approx(3 * 1.0 + 50.0)
    assert found[1] == traffic[1]


def test_groups_of_one_rank_and_a_single_process_are_refused() -> None:
    mesh = Mesh(CPU, dp_shard=2, tp=2)
    assert (
        ledger_name("dp", mesh) == "shard" and ledger_name("tp", mesh) == "tp" and ledger_name("world", mesh) == "norm"
    )
    with pytest.raises(ValueError, match=r"--group=sp is a single rank in this layout; raise parallel.sp"):
        ledger_name("sp", mesh)
    with pytest.raises(ValueError, match=r"--group='pp' is no group of a mesh; choose from tp, sp, shard"):
        ledger_name("pp", mesh)
    assert groups_of(Mesh(CPU)) == {}
    with pytest.raises(ValueError, match="bench comm needs several processes: start them with torchrun"):
        bench_comm(TWO, Session(CPU, 1), payloads=[8])
