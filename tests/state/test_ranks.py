"""Several processes save and resume as one."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from toy_model import engine_config, group_of, optim, toy, train_step

from rae_scale.config.schema import ParallelConfig
from rae_scale.engines import Engine, build_engine
from rae_scale.parallel import Mesh, build_mesh, init_distributed, shutdown_distributed
from rae_scale.state import (
    CheckpointError,
    Retention,
    Saver,
    intact_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    reshard_checkpoint,
)
from rae_scale.state import recover as recover_module
from rae_scale.state import tensorfile as tensorfile_module

pytestmark = pytest.mark.dist
KEEP = Retention(9)


@contextlib.contextmanager
def two_ranks() -> Iterator[Mesh]:
    parallel = ParallelConfig(dp_shard=2)
    mesh = build_mesh(parallel, init_distributed(parallel, "cpu"))
    try:
        yield mesh
    finally:
        shutdown_distributed()


def build(mesh: Mesh) -> Engine:
    return build_engine(engine_config("fsdp2"), optim(), toy(), group_of, mesh)


def step_of(engine: Engine, mesh: Mesh, step: int) -> None:
    train_step(engine, step, mesh.rank, mesh.world_size, 1)


def raises(action: object, error: type[Exception] = CheckpointError) -> str:
    try:
        action()  # type: ignore[operator]
    except error as caught:
        return str(caught)
    raise AssertionError("nothing was raised")


def save_while_training(folder: str) -> None:
    """The writer's collectives and training's go their own ways, whichever rank is slower in which."""
    with two_ranks() as mesh:
        engine, saver = build(mesh), Saver(mesh, buffer_gb=1e-6)
        step_of(engine, mesh, 0)
        held, write = threading.Event(), tensorfile_module.sync
        if mesh.rank == 1:
            tensorfile_module.sync = lambda descriptor: (held.wait(20), write(descriptor))[1]
        before = [piece.tensor.clone() for piece in engine.pieces()]
        saver.save(folder, 1, engine, {}, KEEP)
        for step in range(1, 4):
            step_of(engine, mesh, step)
            assert mesh.gather_objects(mesh.rank) == [0, 1]
            assert float(mesh.all_reduce(torch.tensor(1.0 + mesh.rank))) == 3
        assert latest_checkpoint(folder) is None
        held.set()
        saver.wait()
        tensorfile_module.sync = write
        # Rank 1's disk is full: both hear of it, at the same call.
        if mesh.rank == 1:
            tensorfile_module.sync = full_disk
        saver.save(folder, 4, engine, {}, KEEP)
        step_of(engine, mesh, 4)
        assert "rank 1: " in raises(lambda: saver.save(folder, 5, engine, {}, KEEP))
        # A defect on one rank: that one raises it, the other does not wait for ever.
        if mesh.rank == 1:
            tensorfile_module.sync = defect
        saver.save(folder, 4, engine, {}, KEEP)
        assert "out of it" in raises(saver.wait, MemoryError if mesh.rank == 1 else CheckpointError)
        tensorfile_module.sync = write
        resumed = build(mesh)
        found = intact_checkpoint(folder, mesh)
        assert found is not None
        assert load_checkpoint(found, resumed, mesh, verified=True)["step"] == 1
        assert all(torch.equal(p.tensor, old) for p, old in zip(resumed.pieces(), before, strict=True))
        engine.close()
        resumed.close()


def full_disk(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def defect(descriptor: int) -> None:
    raise MemoryError("out of it")


def resume_damaged(folder: str) -> list[str]:
    """One rank reads the damaged file; both go back to the same checkpoint, and only what is there is judged."""
    with two_ranks() as mesh:
        engine, saver = build(mesh), Saver(mesh, buffer_gb=0)
        for step in (1, 2, 3):
            saver.save(folder, step, engine, {}, KEEP)
        root = Path(folder) / "checkpoints"
        if mesh.is_main:
            for name, step in (("rank-00001.safetensors", 3), ("index.json", 2)):
                (root / f"step-0000000{step}" / name).unlink()
        mesh.barrier()
        found = [str(intact_checkpoint(folder, mesh)) for _ in range(2)]
        assert found[0] == found[1]
        assert mesh.gather_objects(found[0]) == [found[0]] * 2
        # A rank that does not see the folder cannot tell whether it is damaged.
        if mesh.rank == 1:
            recover_module.Path.is_dir = lambda path: False
        assert "put run.dir on a file system that all nodes share" in raises(lambda: intact_checkpoint(folder, mesh))
        engine.close()
        return sorted(path.name for path in root.iterdir())


def test_ranks_save_while_they_train_and_fail_together(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    run_ranks(save_while_training, 2, tmp_path / "ranks", args=(str(tmp_path / "run"),), timeout=240)
    # What two ranks wrote becomes one file, and one process reads it.
    saved = latest_checkpoint(tmp_path / "run")
    assert saved is not None and len(list(saved.glob("rank-*"))) == 2
    single = reshard_checkpoint(saved, tmp_path / "single", 1)
    mesh = Mesh(torch.device("cpu"))
    states = []
    for path in (saved, single):
        engine = build_engine(engine_config("eager"), optim(), toy(), group_of, mesh)
        load_checkpoint(path, engine, mesh)
        states.append({(p.kind, p.name): p.tensor.clone() for p in engine.pieces()})
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_ranks_agree_on_what_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    first, second = run_ranks(resume_damaged, 2, tmp_path / "ranks", args=(str(tmp_path / "run"),), timeout=240)
    assert first == second == ["damaged-step-00000002", "damaged-step-00000003", "latest", "step-00000001"]
    shutil.rmtree(tmp_path / "run")
