"""A checkpoint of one layout is continued by any other, bit by bit from where it was."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from parity import STEPS, State, Variant, build_run, eager, micro_batches, sharded
from torch import Tensor

from rae_scale.config.schema import EngineConfig, ParallelConfig
from rae_scale.parallel import Mesh, build_mesh, init_distributed, shutdown_distributed
from rae_scale.state import load_checkpoint, save_checkpoint
from rae_scale.train.loop import Run, global_step

pytestmark = pytest.mark.dist

SAVED_AT = 5


@dataclass(frozen=True)
class Layout:
    engine: EngineConfig
    parallel: ParallelConfig
    micro_steps: int = 1


LAYOUTS = {
    "zero3-tp2-dp2": Layout(sharded("zero3"), ParallelConfig(tp=2, dp_shard=2)),
    "fsdp2-sp2-dp2": Layout(sharded("fsdp2"), ParallelConfig(sp=2, dp_shard=2), micro_steps=2),
    "eager": Layout(eager(), ParallelConfig()),
}
MORE = {
    "zero1-dp2-tp2": Layout(sharded("zero1"), ParallelConfig(tp=2, dp_shard=2)),
    "fsdp2-tp2-sp2": Layout(sharded("fsdp2"), ParallelConfig(tp=2, sp=2)),
    "fsdp2-hybrid": Layout(sharded("fsdp2"), ParallelConfig(dp_replicate=2, tp=2)),
    "fsdp2-offloaded": Layout(sharded("fsdp2", offload_optimizer=True), ParallelConfig(dp_shard=4)),
    "zero3-offloaded": Layout(sharded("zero3", offload_optimizer=True), ParallelConfig(dp_shard=4)),
}
THREE = {
    "zero3-dp3": Layout(sharded("zero3"), ParallelConfig(dp_shard=3)),
    "fsdp2-dp3": Layout(sharded("fsdp2"), ParallelConfig(dp_shard=3)),
}


def start(layout: Layout, step: int) -> Run:
    """A run that `step` steps are behind of, with fresh weights. An eager one runs on each rank by itself."""
    alone = layout.engine.name == "eager"
    mesh = Mesh(torch.device("cpu")) if alone else build_mesh(layout.parallel, torch.device("cpu"))
    run = build_run(layout.engine, mesh, layout.parallel, Variant(), layout.micro_steps, Path())
    run.step, run.batches = step, micro_batches(mesh, layout.micro_steps, step)
    return run


def go_on(run: Run) -> list[float]:
    return [global_step(run)["loss"] for _ in range(STEPS - SAVED_AT)]


def whole_state(run: Run) -> State:
    """The state of all ranks, put together without the help of a checkpoint."""
    whole: State = {}
    mine = [(p.kind, p.name, p.shape, p.box, p.tensor.clone()) for p in run.engine.pieces()]
    for pieces in run.mesh.gather_objects(mine):
        for kind, name, shape, box, tensor in pieces:
            whole.setdefault((kind, name), torch.full(shape, torch.nan))[box.slices] = tensor
    return whole


@dataclass(frozen=True)
class Source:
    path: Path
    state: State
    losses: list[float]
    """Of the steps after the save, uninterrupted."""


def make_source(name: str, layout: Layout, folder: Path, rank: int) -> Source:
    run = start(layout, 0)
    for _ in range(SAVED_AT):
        global_step(run)
    alone = run.mesh.world_size == 1
    own = folder / (f"{name}-{rank}" if alone else name)
    path = save_checkpoint(own, SAVED_AT, run.engine, run.mesh, {}, keep_last=1)
    source = Source(folder / f"{name}-0" / "checkpoints" / path.name if alone else path, whole_state(run), go_on(run))
    run.engine.close()
    return source


def check_resume(name: str, layout: Layout, source_name: str, source: Source) -> None:
    run = start(layout, SAVED_AT)
    load_checkpoint(source.path, run.engine, run.mesh)
    for piece in run.engine.pieces():
        expected: Tensor = source.state[piece.kind, piece.name][piece.box.slices]
        assert torch.equal(piece.tensor, expected), (source_name, name, piece.kind, piece.name)
    assert run.engine.optimizer_step == SAVED_AT
    losses = go_on(run)
    if name == source_name:
        assert losses == source.losses, name
    else:
        assert losses == pytest.approx(source.losses, rel=1e-6), (source_name, name)
    run.engine.close()


def move(folder: str, sources: list[str], targets: list[str]) -> None:
    init_distributed(ParallelConfig(dp_shard=4), "cpu")
    rank = torch.distributed.get_rank()
    layouts = LAYOUTS | MORE
    made = {name: make_source(name, layouts[name], Path(folder), rank) for name in sources}
    torch.distributed.barrier()
    for source_name, source in made.items():
        for name in targets:
            check_resume(name, layouts[name], source_name, source)
    if rank == 0:
        (Path(folder) / "sources").write_bytes(pickle.dumps(made))
    shutdown_distributed()


def resume_on_three(folder: str) -> None:
    init_distributed(ParallelConfig(dp_shard=3), "cpu")
    made: dict[str, Any] = pickle.loads((Path(folder) / "sources").read_bytes())
    for source_name, source in made.items():
        for name, layout in THREE.items():
            check_resume(name, layout, source_name, source)
    shutdown_distributed()


def test_from_each_to_each(tmp_path: Path) -> None:
    run_ranks(move, 4, tmp_path, args=(str(tmp_path), list(LAYOUTS), list(LAYOUTS)))


@pytest.mark.matrix
def test_from_and_to_more_layouts_and_on_with_three_ranks(tmp_path: Path) -> None:
    run_ranks(move, 4, tmp_path, args=(str(tmp_path), list(LAYOUTS | MORE), list(LAYOUTS | MORE)), timeout=3000)
    run_ranks(resume_on_three, 3, tmp_path, args=(str(tmp_path),), timeout=3000)
