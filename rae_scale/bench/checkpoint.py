"""Checkpoints: how long saving holds training up, loading, checking and resharding take, beside a plain file write."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rae_scale.bench.chart import bars
from rae_scale.bench.harness import Benchmark, Case, Measured, Overrides, run_benchmark
from rae_scale.bench.record import Measure, Record, facts_of
from rae_scale.bench.session import Session
from rae_scale.bench.setup import Step, StepSetup
from rae_scale.bench.step import settings, step_of
from rae_scale.bench.timing import synchronize
from rae_scale.state import Retention, Saver, latest_checkpoint, load_checkpoint, reshard_checkpoint, save_checkpoint
from rae_scale.state.format import rank_file, sync_folder
from rae_scale.state.load import check_files

CHUNK = 64 * 2**20
MOUNTS = Path("/proc/self/mounts")

COLUMNS = {
    "setting": "{name}",
    "GB": "{gigabytes:.3f}",
    **{
        heading: text
        for title, name in (("save", "save"), ("load", "load"), ("verify", "verify"), ("reshard", "reshard"))
        for heading, text in ((f"{title} ms", f"{{{name}_ms:.0f}}"), (f"{title} GB/s", f"{{{name}_gb_s:.2f}}"))
    },
    "asynchronous: stall ms": "{stall_ms:.0f}",
    "on disk after ms": "{saved_ms:.0f}",
    "plain write ms": "{plain_ms:.0f}",
    "plain write GB/s": "{plain_gb_s:.2f}",
    "save / plain": "{save_of_plain:.2f}",
}


def bench_checkpoint(
    setup: StepSetup,
    session: Session,
    points: Sequence[Overrides] = ((),),
    *,
    folder: Path,
    files: int = 4,
    repeats: int = 3,
    after_row: Callable[[Record], None] = lambda record: None,
) -> Record:
    """A row for each point: a model and engine of `setup`, after one step. Collective.

    folder: on the file system in question; what is written there is removed. files: that resharding writes.

    Raises:
        ValueError: the setup is no model or no setting, or the folder cannot be written to.
    """
    if not folder.is_dir():
        raise ValueError(f"--folder={folder} is no folder; give one on the file system that checkpoints will be on")

    def cases_of(point: Overrides) -> list[Case]:
        here = setup.with_overrides(point)
        config = here.config()
        own = settings(here, "ours", "checkpoint", ["run.save_buffer_gb"])
        own |= {"filesystem": filesystem(folder), "files": files}
        run = functools.partial(measure, here, session, folder, files, repeats)
        return [Case(own, facts_of(config, precision=config.engine.precision), run)]

    return run_benchmark(CHECKPOINT, points, cases_of, session, after_row=after_row)


def measure(setup: StepSetup, session: Session, folder: Path, files: int, repeats: int) -> Measured:
    """Of the slowest rank; resharding is one process's work."""
    mesh = session.mesh(setup.config().parallel)
    clock = Clock(session)
    with step_of(setup, "ours", mesh) as step, scratch(folder, session) as run_dir:
        # Otherwise the moments were zeros, which a file system may store for nothing.
        step.run([step.inputs(step.batch, 0)] * step.micro_steps)
        saver = Saver(mesh, step.config.run.save_buffer_gb)
        for number in range(repeats):
            time_saving(step, clock, saver, run_dir, 2 * number)
            path = newest(run_dir)
            time_reading(step, clock, path, run_dir / "resharded", files)
        total = sum(file.stat().st_size for file in path.iterdir())
    measures = {name: Measure.of(session.slowest(times)) for name, times in clock.seconds.items()}
    values: dict[str, Any] = {"gigabytes": total / 1e9}
    values |= {f"{name}_gb_s": total / 1e9 / measures[name].median for name in measures if name != "stall"}
    return Measured(measures, values | {"save_of_plain": measures["save"].median / measures["plain"].median})


class Clock:
    """Seconds of this process by the name of what it did. All processes begin an operation together."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.seconds: dict[str, list[float]] = {}

    def start(self) -> float:
        synchronize(self.session.device)
        self.session.barrier()
        return time.perf_counter()

    def stop(self, name: str, started: float) -> None:
        synchronize(self.session.device)
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)


def time_saving(step: Step, clock: Clock, saver: Saver, run_dir: Path, number: int) -> None:
    """Save within the step, write the same bytes plainly, save beside training."""
    extra: dict[str, Any] = {}
    started = clock.start()
    path = save_checkpoint(run_dir, number, step.engine, step.mesh, extra, keep_last=1)
    clock.stop("save", started)
    plain, size = run_dir / f"plain-{step.mesh.rank}", (path / rank_file(step.mesh.rank)).stat().st_size
    started = clock.start()
    write_plain(plain, size)
    clock.stop("plain", started)
    plain.unlink()
    started = clock.start()
    saver.save(run_dir, number + 1, step.engine, extra, Retention(1))
    clock.stop("stall", started)
    saver.wait()
    clock.stop("saved", started)


def time_reading(step: Step, clock: Clock, path: Path, resharded: Path, files: int) -> None:
    mesh = step.mesh
    forget(path)
    started = clock.start()
    check_files(path, mesh.rank, mesh.world_size)
    clock.stop("verify", started)
    clock.session.barrier()
    forget(path)
    started = clock.start()
    load_checkpoint(path, step.engine, mesh, verified=True)
    clock.stop("load", started)
    clock.session.barrier()
    forget(path)
    started = clock.start()
    if mesh.is_main:
        reshard_checkpoint(path, resharded, files)
    clock.stop("reshard", started)
    if mesh.is_main:
        shutil.rmtree(resharded)


def newest(run_dir: Path) -> Path:
    found = latest_checkpoint(run_dir)
    assert found is not None, "it was just saved"
    return found


def write_plain(path: Path, size: int) -> None:
    """`size` bytes to a new file and to the disk: what the file system can do. Random ones: nothing compresses them."""
    chunk = memoryview(os.urandom(min(size, CHUNK)))
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, CHUNK):
            file.write(chunk[: min(CHUNK, size - start)])
        os.fsync(file.fileno())
    sync_folder(path.parent)


def forget(folder: Path) -> None:
    """Let the system drop the files' contents from its memory, so that reading them reads the disk. A file system
    without a page cache of its own has nothing to drop."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def scratch(folder: Path, session: Session) -> Iterator[Path]:
    """A new folder in `folder`, the same for all processes, removed afterwards."""
    made = tempfile.mkdtemp(prefix="rae-scale-bench-", dir=folder) if session.is_main else ""
    path = Path(session.gather(made)[0])
    try:
        yield path
        session.barrier()
    finally:
        if session.is_main:
            shutil.rmtree(path, ignore_errors=True)


def filesystem(folder: Path) -> str | None:
    """Kind of the file system that `folder` is on, such as ext4, nfs4 or lustre; None where the system does not say."""
    if not MOUNTS.is_file():
        return None
    mounts = [line.split()[1:3] for line in MOUNTS.read_text().splitlines()]
    here = folder.resolve()
    holding = [(len(point), kind) for point, kind in mounts if here.is_relative_to(point)]
    return max(holding)[1] if holding else None


def notes(record: Record) -> list[str]:
    return [
        "save: within the step. Asynchronous: how long training waits for the copy to host memory, and when the "
        "checkpoint is on disk. Plain write: the same bytes from memory into a file per rank, with fsync, in the same "
        "folder. Before each reading the files were dropped from the page cache. Reshard: one process, checking "
        "included."
    ]


CHART = bars("save", "stall", "saved", "load", "plain")
CHECKPOINT = Benchmark("checkpoint", "Checkpoints", COLUMNS, CHART, notes=notes)
