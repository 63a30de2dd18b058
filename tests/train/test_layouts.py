"""The same loss curve from every engine: one process, two under ZeRO-3, two under FSDP2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from tiny_world import TinyWorld, read_metrics, train_rank

from rae_scale.train import train

STEPS = 20
ENGINES = {"zero": {"engine__name": "zero", "engine__zero_stage": 3}, "fsdp2": {"engine__name": "fsdp2"}}
CURVE = ("loss", "loss_flow", "loss_text", "loss_flow_bin_0")

pytestmark = pytest.mark.dist


def settings(engine: str) -> dict[str, Any]:
    if engine == "eager":
        # Four micro-batches in one process against two in each of two: sums do not care.
        return {"run__max_steps": STEPS, "data__micro_batch_size": 2}
    return {"run__max_steps": STEPS, "data__micro_batch_size": 2, "parallel__dp_shard": 2, **ENGINES[engine]}


@pytest.fixture(scope="module")
def reference(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("eager")
    train(world.config(folder, **settings("eager")))
    return read_metrics(folder)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_two_processes_give_the_curve_of_one(
    world: TinyWorld, tmp_path: Path, reference: list[dict[str, Any]], engine: str
) -> None:
    tree = world.tree(tmp_path / "run", **settings(engine))
    run_ranks(train_rank, 2, tmp_path, args=(tree,))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for ours, theirs in zip(lines, reference, strict=True):
        for name in CURVE:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours["step"], name)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), ours["step"]
