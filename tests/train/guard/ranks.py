"""What the ranks do that the tests start."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "dist")]  # for `faulty` and `toy_model`

from faulty import FullAt, Record, faulty_loss  # noqa: E402
from toy_model import engine_config, group_of, optim, toy, train_step  # noqa: E402

from rae_scale.config import parse_config  # noqa: E402
from rae_scale.config.schema import ParallelConfig  # noqa: E402
from rae_scale.engines import Copy, Engine, build_engine  # noqa: E402
from rae_scale.parallel import Mesh, build_mesh, init_distributed, shutdown_distributed  # noqa: E402
from rae_scale.train import setup  # noqa: E402
from rae_scale.train.callbacks import Callback  # noqa: E402
from rae_scale.train.guard.replicas import ReplicasDrifted, check_replicas, coverage  # noqa: E402
from rae_scale.train.loop import Run, run_loop  # noqa: E402
from rae_scale.train.stages import GenerationStage  # noqa: E402
from rae_scale.train.watch import Watch  # noqa: E402

CPU = torch.device("cpu")
Tree = dict[str, Any]


def two_ranks(
    faulty: list[Tree],
    faults: Mapping[int, str],
    full_at: tuple[int, int],
    drifting: list[Tree],
    flip_at: int,
    flipped: list[tuple[str, int, dict[str, int]]],
) -> dict[str, Any]:
    """All of the below in one world: a process cannot leave the others and join them again."""
    with world(2):
        plain = GenerationStage.loss
        results: dict[str, Any] = {"faults": train_with_faults(faulty, faults, full_at)}
        GenerationStage.loss = plain  # type: ignore[method-assign]
        results["drift"] = train_until_drift(drifting, flip_at)
        results["flips"] = [flip_on_rank(*case, victim=1) for case in flipped]
        return results


@contextlib.contextmanager
def world(size: int) -> Iterator[None]:
    init_distributed(ParallelConfig(dp_shard=size), "cpu")
    try:
        yield
    finally:
        shutdown_distributed()


def runs(trees: list[Tree]) -> Iterator[Run]:
    for tree in trees:
        config = parse_config(tree)
        run = setup.build_run(config, build_mesh(config.parallel, CPU), Watch())
        try:
            yield run
        finally:
            run.batches.close()
            run.engine.close()


def train_with_faults(
    trees: list[Tree], faults: Mapping[int, str], full_at: tuple[int, int]
) -> list[tuple[list[bool], list[int]]]:
    """Per training and step: whether it changed nothing on this rank, and how many were skipped until then. The disk of
    rank 1 is full while so many steps are done."""
    GenerationStage.loss = faulty_loss(faults)  # type: ignore[method-assign]
    seen = []
    for run in runs(trees):
        record = Record()
        run.callbacks.insert(0, record)
        if run.mesh.rank == 1:
            run.callbacks.insert(0, FullAt(setattr, *full_at))
        run_loop(run)
        seen.append((record.unchanged, record.skipped))
    return seen


def train_until_drift(trees: list[Tree], flip_at: int) -> list[tuple[str, int]]:
    """Per training: what it ended with, and after which step."""
    ends = []
    for run in runs(trees):
        run.callbacks.insert(0, FlipAt(flip_at))
        message = ""
        try:
            run_loop(run)
        except ReplicasDrifted as error:
            message = str(error)
        ends.append((message, run.step))
    return ends


class FlipAt(Callback):
    """Flips a bit of a weight of the last rank's when `step` steps are done."""

    main_only = False

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        if run.step == self.step and run.mesh.rank == run.mesh.world_size - 1:
            flip_bit(last_copy(run.engine, "weight").tensor)


def flip_on_rank(name: str, stage: int, sizes: dict[str, int], victim: int) -> dict[str, Any]:
    """What an engine compares, and what is said of a clean state, of a bit flipped on `victim`, by kind of tensor, and
    when it is flipped back."""
    mesh = build_mesh(ParallelConfig(**sizes), CPU)
    engine = trained(mesh, name, stage)
    kinds = sorted({copy.kind for copy in engine.copies()})
    messages = {"clean": problem(engine, mesh)}
    for kind in kinds:
        tensor = last_copy(engine, kind).tensor
        if mesh.rank == victim:
            flip_bit(tensor)
        messages[kind] = problem(engine, mesh)
        if mesh.rank == victim:
            flip_bit(tensor)
    messages["restored"] = problem(engine, mesh)
    names = {kind: last_copy(engine, kind).name for kind in kinds}
    said = coverage(engine, name)
    engine.close()
    return {"names": names, "coverage": said, "messages": messages}


def trained(mesh: Mesh, name: str, stage: int = 3) -> Engine:
    engine = build_engine(engine_config(name, stage), optim(), toy(), group_of, mesh)
    for step in range(2):
        train_step(engine, step, mesh.dp_rank, mesh.dp_world, 1)
    return engine


def last_copy(engine: Engine, kind: str) -> Copy:
    """One of those that are trained: frozen ones come first, where an engine lists them apart."""
    return [copy for copy in engine.copies() if copy.kind == kind and copy.tensor.numel()][-1]


@torch.no_grad()
def flip_bit(tensor: torch.Tensor) -> None:
    """Flip the least bit of the last element, in the memory of `tensor` [...]."""
    tensor.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)


def problem(engine: Engine, mesh: Mesh) -> str:
    try:
        check_replicas(engine, mesh)
    except ReplicasDrifted as error:
        return str(error)
    return ""


def faults_alone(*args: Any) -> list[tuple[list[bool], list[int]]]:
    with world(2):
        return train_with_faults(*args)


def drift_alone(trees: list[Tree], flip_at: int) -> list[tuple[str, int]]:
    with world(2):
        return train_until_drift(trees, flip_at)


def flips_alone(sizes: dict[str, int], victim: int) -> dict[str, str]:
    with world(math.prod(sizes.values())):
        return flip_on_rank("fsdp2", 3, sizes, victim)["messages"]


def train_clean(steps: int) -> int:
    """Compare replicas after each of `steps` steps, and return how often that was."""
    with world(2):
        mesh = build_mesh(ParallelConfig(dp_replicate=2), CPU)
        engine, compared = trained(mesh, "fsdp2"), 0
        for step in range(steps):
            train_step(engine, step, mesh.dp_rank, mesh.dp_world, 1)
            check_replicas(engine, mesh)
            compared += 1
        engine.close()
        return compared
