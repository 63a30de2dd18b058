"""A disk that is full, at any write: what is there stays, and training goes on or stops as it was told to."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty import FULL, FullAt, add_callback, curve, finish_save
from tiny_world import TinyWorld, read_metrics
from toy_model import engine_config, group_of, optim, toy, train_step

from rae_scale.engines import Engine, build_engine
from rae_scale.parallel import Mesh
from rae_scale.state import CheckpointError, Retention, Saver, latest_checkpoint, read_state
from rae_scale.state.format import damaged_files
from rae_scale.state.space import checkpoint_bytes, to_come, warn_if_short
from rae_scale.train import setup, train
from rae_scale.train.callbacks import Callback
from rae_scale.train.guard import lines as lines_module

KEEP = Retention(9)


class Disk:
    """Counts what changes the disk below a folder, and lets the `fails_at`-th of it fail: a file opened for writing, a
    write into it, a rename, a new folder, a sync."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root = root
        self.count = 0
        self.fails_at = 0
        self.error = FULL
        path_open, replace, rename, mkdir = Path.open, os.replace, os.rename, Path.mkdir

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "r" in mode or not path.is_relative_to(root):
                return path_open(path, mode, *args, **kwargs)
            self.touch()
            return Writes(path_open(path, mode, *args, **kwargs), self)

        def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                if Path(path).is_relative_to(root):
                    self.touch()
                return plain(path, *args, **kwargs)

            return call

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(Path, "mkdir", counted(mkdir))
        monkeypatch.setattr(os, "replace", counted(replace))
        monkeypatch.setattr(os, "rename", counted(rename))

    def touch(self) -> None:
        self.count += 1
        if self.count == self.fails_at:
            raise self.error


class Writes:
    """A file whose writes are counted."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: Any) -> int:
        self.disk.touch()
        return self.file.write(data)

    def fileno(self) -> int:
        self.disk.touch()  # asked for by the sync
        return self.file.fileno()

    def __enter__(self) -> Writes:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(torch.device("cpu"))


@pytest.fixture
def engine(mesh: Mesh) -> Iterator[Engine]:
    engine = build_engine(engine_config("eager"), optim(), toy(), group_of, mesh)
    train_step(engine, 0, 0, 1, 1)
    yield engine
    engine.close()


def hidden(run_dir: Path) -> list[str]:
    return [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".step")]


@pytest.mark.parametrize("step", [2, pytest.param(1, marks=pytest.mark.long)], ids=["new", "replaced"])
@pytest.mark.parametrize("buffer_gb", [0.0, pytest.param(1.0, marks=pytest.mark.long)], ids=["within", "beside"])
def test_a_disk_that_is_full_at_any_write_leaves_a_checkpoint_and_room_for_the_next(
    buffer_gb: float, step: int, mesh: Mesh, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """step: which is saved when step 1 is on disk already."""
    saver = Saver(mesh, buffer_gb)
    disk = Disk(monkeypatch, tmp_path)

    def save(run_dir: Path, step: int) -> None:
        saver.save(run_dir, step, engine, {}, KEEP)
        saver.wait()

    save(tmp_path / "0", 1)
    disk.count = 0
    save(tmp_path / "0", step)
    writes = disk.count
    assert writes > 100  # each tensor is one
    # Every write of the small files at the end, and some of the many tensors.
    for number in (*range(1, writes - 15, 40), *range(writes - 15, writes + 1)):
        run_dir = tmp_path / str(number)
        save(run_dir, 1)
        failures = saver.failures
        disk.count, disk.fails_at = 0, number
        disk.error = OSError(*((errno.EDQUOT, "Disk quota exceeded") if number % 2 else FULL.args))
        with pytest.raises(CheckpointError, match=r"could not be saved in .*(No space left|quota exceeded)"):
            save(run_dir, step)
        disk.fails_at = 0
        assert saver.failures == failures + 1
        assert not any(name.endswith(".tmp") for name in hidden(run_dir)), number
        newest = latest_checkpoint(run_dir)
        assert newest is not None and damaged_files(newest) == [], number
        assert read_state(newest)["step"] in (1, step), number
        save(run_dir, 3)
        newest = latest_checkpoint(run_dir)
        assert newest is not None and newest.name == "step-00000003" and damaged_files(newest) == [], number
        assert hidden(run_dir) == [], number
        shutil.rmtree(run_dir)


SETTINGS: dict[str, Any] = {"run__max_steps": 6, "run__save_every": 2, "run__keep_last": 9}


@pytest.mark.parametrize("buffer_gb", [pytest.param(0.0, marks=pytest.mark.long), 1.0], ids=["within", "beside"])
def test_training_goes_on_without_a_checkpoint_and_makes_the_next(
    buffer_gb: float,
    world: TinyWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = SETTINGS | {"run__save_buffer_gb": buffer_gb}
    train(world.config(tmp_path / "plain", **settings))
    with monkeypatch.context() as patch:
        patch.setattr(setup, "build_callbacks", add_callback(FullAt(patch.setattr, 2, 5), setup.build_callbacks))
        train(world.config(tmp_path / "full", **settings))
    names = sorted(path.name for path in (tmp_path / "full" / "checkpoints").glob("step-*"))
    assert names == ["step-00000002", "step-00000006"]
    assert hidden(tmp_path / "full") == []
    failures = [line.pop("save_failures") for line in read_metrics(tmp_path / "full")]
    assert failures == [0, 0, 0, 0, 1, 1] or failures == [0, 0, 0, 0, 0, 1]  # a thread finds out
    ours, plain = (curve(read_metrics(tmp_path / name)) for name in ("full", "plain"))
    assert all(line.pop("save_failures") is not None for line in ours + plain) and ours == plain
    assert any("step 4 could not be saved" in r.message for r in caplog.records if r.levelno == logging.WARNING)
    assert any("on_save_failure=continue" in record.message for record in caplog.records)


@pytest.mark.parametrize("buffer_gb", [0.0, pytest.param(1.0, marks=pytest.mark.long)], ids=["within", "beside"])
def test_without_its_last_checkpoint_no_run_ends_well(
    buffer_gb: float, world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        setup, "build_callbacks", add_callback(FullAt(monkeypatch.setattr, 3, 99), setup.build_callbacks)
    )
    with pytest.raises(CheckpointError, match=r"step 6 could not be saved"):
        train(world.config(tmp_path, run__save_buffer_gb=buffer_gb, **SETTINGS))
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step-00000002"


class LogsFullAt(Callback):
    """Lines cannot be written while `first` to `end` - 1 steps are done; half of one gets through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, end: int) -> None:
        self.first, self.end, self.step = first, end, 0
        write = os.write

        def limited(descriptor: int, data: Any) -> int:
            if not self.first <= self.step < self.end:
                return write(descriptor, data)
            if len(data) > 20:
                return write(descriptor, data[:20])
            raise FULL

        monkeypatch.setattr(lines_module.os, "write", limited)

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        self.step = run.step


def test_lines_wait_for_room_and_are_whole(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(setup, "build_callbacks", add_callback(LogsFullAt(monkeypatch, 2, 5), setup.build_callbacks))
    train(world.config(tmp_path, **SETTINGS))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    warnings = [record.message for record in caplog.records if "metrics.jsonl cannot be written" in record.message]
    assert len(warnings) == 1 and "training goes on" in warnings[0]


def test_lines_that_cannot_be_written_stop_a_run_that_was_told_so(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "build_callbacks", add_callback(LogsFullAt(monkeypatch, 2, 99), setup.build_callbacks))
    train(world.config(tmp_path, fault__on_save_failure="stop", **SETTINGS))
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step-00000002"  # the stop is as a signal's: saved, to be resumed
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_tensorboard_gives_a_file_up_and_begins_another(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard import SummaryWriter

    made: list[Any] = []
    init, write = SummaryWriter.__init__, RecordWriter.write

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        init(self, *args, **kwargs)

    def full(self: Any, data: bytes) -> None:
        if len(made) == 1 and b"loss" in data:
            raise FULL
        write(self, data)

    monkeypatch.setattr(SummaryWriter, "__init__", counted)
    monkeypatch.setattr(RecordWriter, "write", full)
    monkeypatch.setattr("threading.excepthook", lambda args: None)  # the writer's thread ends with the error
    monkeypatch.setattr("rae_scale.train.callbacks.tensorboard.RETRY_SECONDS", 0.0)
    train(world.config(tmp_path, run__tensorboard=True, run__log_every=1, run__max_steps=4))
    assert len(made) == 2
    assert any("tensorboard cannot be written" in record.message for record in caplog.records)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_room_is_looked_at_before_it_is_needed(
    mesh: Mesh, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = checkpoint_bytes(engine, mesh)
    Saver(mesh, 0).save(tmp_path, 1, engine, {}, KEEP)
    written = sum(path.stat().st_size for path in (tmp_path / "checkpoints" / "step-00000001").glob("rank-*"))
    assert size < written < 1.2 * size + 20_000  # a header more
    assert [to_come(tmp_path, keep) for keep in (1, 2, 9)] == [1, 2, 9]
    for free, short in ((3 * size, False), (3 * size - 1, True)):
        monkeypatch.setattr("rae_scale.state.space.free_bytes", lambda folder, free=free: free)
        assert warn_if_short(tmp_path, size, 3) == short
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "lower run.keep_last" in record.message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of some bytes."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a small tmpfs needs root and CAP_SYS_ADMIN; run the tests in such a container")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer
def test_a_small_disk_that_is_cleared_in_time(
    small_disk: Callable[[int], Path],
    world: TinyWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A real one: something else fills it before step 4 is saved, and is gone before step 6."""
    train(world.config(tmp_path / "plain", **SETTINGS))
    sizes = {path: path.stat().st_size for path in (tmp_path / "plain").rglob("*") if path.is_file()}
    checkpoint = sum(size for path, size in sizes.items() if "step-00000002" in path.parts)
    disk = small_disk(4 * checkpoint + (4 << 20))

    class Filler(Callback):
        def on_step_start(self, run: Any) -> None:
            if run.step == 3:
                with (disk / "filler").open("wb", buffering=0) as file:
                    for size in (1 << 20, 4096):
                        for _ in itertools.count():
                            try:
                                file.write(bytes(size))
                            except OSError:
                                break
            if run.step == 5:
                finish_save(run)
                (disk / "filler").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(setup, "build_callbacks", add_callback(Filler(), setup.build_callbacks))
        train(world.config(disk / "run", run__tensorboard=True, **SETTINGS))
    names = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step-00000002", "step-00000006"]
    assert [damaged_files(disk / "run" / "checkpoints" / name) for name in names[1:]] == [[], []]
    lines = read_metrics(disk / "run")
    assert lines[-1].pop("save_failures") == 1
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == [line["loss"] for line in read_metrics(tmp_path / "plain")]
    assert any("No space left on device" in record.message for record in caplog.records)
    assert json.loads((disk / "run" / "checkpoints" / names[-1] / "state.json").read_text())["step"] == 6
