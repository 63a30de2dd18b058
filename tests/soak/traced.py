"""`rae-scale` on one rank, watched: where the process is at this instant, and which samples each step had.

    python traced.py -u -m rae_scale train CONFIG

is `python -u -m rae_scale train CONFIG` that leaves in the folder $TRACES what `Trace` describes. torchrun starts its
ranks so if $PYTHON_EXEC says so.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

PHASES = ("start", "join", "build", "load", "data", "forward", "all-reduce", "backward", "update", "between", "end")
SAVING = ("", "write", "publish")
LAYOUT = struct.Struct("<iiiBB")  # `Place`
PHASE = 12  # where its phase begins


class Place(NamedTuple):
    """Where a rank is.

    steps: global steps begun. first: and how many of them before this process. saving: what its saving thread does.
    """

    pid: int
    steps: int
    first: int
    phase: str
    saving: str


class Trace:
    """A few bytes of memory shared through a file, which say where a rank is. They outlive the rank, so what a killed
    one was doing can be read afterwards."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{rank}"
        with path.open("ab") as file:
            file.truncate(LAYOUT.size)
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), LAYOUT.size)

    def read(self) -> Place:
        pid, steps, first, phase, saving = LAYOUT.unpack(self.memory[:])
        return Place(pid, steps, first, PHASES[phase], SAVING[saving])

    def begin(self) -> None:
        """This process is the rank from now on."""
        self.memory[4:] = bytes(LAYOUT.size - 4)
        self.memory[:4] = struct.pack("<i", os.getpid())

    def set_steps(self, steps: int) -> None:
        self.memory[4:8] = struct.pack("<i", steps)

    def begin_loop(self, steps: int) -> None:
        self.memory[4:12] = struct.pack("<ii", steps, steps)
        self.enter("between")

    def enter(self, phase: str) -> None:
        self.memory[PHASE] = PHASES.index(phase)

    @contextlib.contextmanager
    def within(self, place: str) -> Iterator[None]:
        index, names = (PHASE + 1, SAVING) if place in SAVING else (PHASE, PHASES)
        before = self.memory[index]
        self.memory[index] = names.index(place)
        yield
        self.memory[index] = before  # not after an error: the place where it happened is of interest


def tracing(folder: Path) -> dict[str, str]:
    """Variables that make torchrun start its ranks so that they leave their traces in `folder`."""
    folder.mkdir(exist_ok=True)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n')
    python.chmod(0o755)
    return {"PYTHON_EXEC": str(python), "TRACES": str(folder)}


def samples_path(folder: Path, rank: int) -> Path:
    return folder / f"samples-{rank}.jsonl"


def read_samples(folder: Path, rank: int) -> list[dict[str, Any]]:
    """What a rank was given, in the order of time, over all its lives: step, positions in the data order, and ids."""
    rows = []
    for line in samples_path(folder, rank).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill
            rows.append(json.loads(line))
    return [row for row in rows if row]


def final_samples(folder: Path, ranks: int) -> dict[int, list[tuple[int, str]]]:
    """Step -> (position, id) of every sample that it was trained on in the end: the last time that it was done."""
    history: dict[int, list[tuple[int, str]]] = {}
    for rank in range(ranks):
        last = {row["step"]: row for row in read_samples(folder, rank)}
        for step, row in last.items():
            history.setdefault(step, []).extend(zip(row["positions"], row["ids"], strict=True))
    return dict(sorted(history.items()))


def watch(folder: Path, rank: int) -> Trace:
    """Make this process's training leave its trace."""
    trace = Trace(folder, rank)
    trace.begin()
    from rae_scale.data.loader import Loader
    from rae_scale.parallel import Mesh
    from rae_scale.state import save, saver
    from rae_scale.train import loop, setup

    samples = samples_path(folder, rank).open("a", encoding="utf-8")
    samples.write("{}\n" if samples.tell() == 0 else "\n{}\n")

    def within(place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with trace.within(place):
                return function(*args, **kwargs)

        return watched

    def next_batches(loader: Any) -> Any:
        batches = read_next(loader)
        trace.set_steps(loader.step)
        positions = [int(position) for batch in batches for position in batch.sample_index]
        ids = [sample_id for batch in batches for sample_id in batch.sample_ids]
        samples.write(json.dumps({"step": loader.step, "positions": positions, "ids": ids}) + "\n")
        samples.flush()
        return batches

    def build_engine(*args: Any, **kwargs: Any) -> Any:
        engine = make_engine(*args, **kwargs)
        engine.backward = within("backward", engine.backward)
        engine.step = within("update", engine.step)
        return engine

    def run_loop(run: Any) -> None:
        trace.begin_loop(run.step)
        train(run)
        trace.enter("end")

    read_next, make_engine, train = Loader.__next__, setup.build_engine, setup.run_loop
    Loader.__next__ = within("data", next_batches)  # type: ignore[method-assign]
    Mesh.all_reduce = within("all-reduce", Mesh.all_reduce)  # type: ignore[method-assign]
    Mesh.any = within("all-reduce", Mesh.any)  # type: ignore[method-assign]
    loop.global_step = within("forward", loop.global_step)
    setup.init_distributed = within("join", setup.init_distributed)
    setup.build_run = within("build", setup.build_run)
    setup.load_checkpoint = within("load", setup.load_checkpoint)
    setup.build_engine = build_engine
    setup.run_loop = run_loop
    saver.write_checkpoint = within("write", saver.write_checkpoint)
    save.publish = within("publish", save.publish)
    return trace


def main(arguments: list[str]) -> None:
    assert arguments[:3] == ["-u", "-m", "rae_scale"], f"not what torchrun starts: {arguments}"
    watch(Path(os.environ["TRACES"]), int(os.environ["RANK"]))
    from rae_scale.cli.main import main as rae_scale

    sys.argv = ["rae-scale", *arguments[3:]]
    rae_scale()


if __name__ == "__main__":
    main(sys.argv[1:])
