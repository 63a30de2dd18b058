"""Several readers side by side: each in a process of its own, measured in turns.

A shared machine is faster at one moment than at the next. So every round measures one reader after the other, while
the others are stopped with all their workers, and medians over the rounds are compared.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rae_scale.bench.data_readers import Batches, Reader

PREFETCHED = 2
"""Batches that a worker of PyTorch's loader has ready; what was ready before the clock started is read first."""
END_SECONDS = 10.0


class Lap(NamedTuple):
    """Time for a number of images: seconds by the clock, and of all cores together."""

    images: int
    wall: float
    cpu: float


@dataclass(frozen=True)
class Result:
    """first: seconds from nothing open to the first batch, for each start. memory: bytes at the end."""

    first: list[float]
    laps: list[Lap] = field(default_factory=list)
    memory: int = 0


class ReaderFailed(ValueError):
    """What a reader's process said before it ended."""


def race(readers: Mapping[str, Reader], *, workers: int, rounds: int, starts: int) -> dict[str, Result | ReaderFailed]:
    """Measure all readers in `rounds` turns, each as many batches as `workers` make at once (at least one).

    starts: how often each is opened, to see how long its first batch takes. A reader that fails does not end the race.
    """
    found: dict[str, Result | ReaderFailed] = {}
    with ExitStack() as stack:
        runners = {}
        for name, reader in readers.items():
            runner = stack.enter_context(Runner(reader, workers, starts))
            try:
                found[name] = Result(runner.answer())
                runners[name] = runner
            except ReaderFailed as error:
                found[name] = error
        for _ in range(rounds):
            for name, runner in list(runners.items()):
                result = found[name]
                assert isinstance(result, Result)
                try:
                    result.laps.append(Lap(*runner.ask("lap")))
                except ReaderFailed as error:
                    found[name] = error
                    del runners[name]
        for name, runner in runners.items():
            found[name] = Result(found[name].first, found[name].laps, runner.ask("memory"))  # type: ignore[union-attr]
    return found


class Runner:
    """A process that reads when it is asked to, and is stopped otherwise."""

    def __init__(self, reader: Reader, workers: int, starts: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(reader, workers, starts, theirs))
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        """What the process says next; it is stopped after that. Raises ReaderFailed."""
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise ReaderFailed(f"its process ended with status {self.process.exitcode}") from None
        if isinstance(answer, ReaderFailed):
            raise answer
        self.signal(signal.SIGSTOP)
        return answer

    def ask(self, question: str) -> Any:
        self.signal(signal.SIGCONT)
        self.pipe.send(question)
        return self.answer()

    def signal(self, number: signal.Signals) -> None:
        """To the process and its workers, which are a process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, number)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *raised: object) -> None:
        self.signal(signal.SIGCONT)
        self.pipe.close()
        self.process.join(END_SECONDS)
        self.signal(signal.SIGKILL)
        self.process.kill()
        self.process.join()


def serve(reader: Reader, workers: int, starts: int, pipe: Connection) -> None:
    """In the reader's process: answer until the other side closes the pipe."""
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    try:
        reader.prepare()
        first, batches = start(reader, starts)
        with closing(batches), suppress(EOFError, BrokenPipeError):  # which say that the race is over
            pipe.send(first)
            while True:
                pipe.send(lap(batches, workers) if pipe.recv() == "lap" else memory())
    except Exception as error:
        pipe.send(ReaderFailed(f"{type(error).__name__}: {error}"))


def start(reader: Reader, starts: int) -> tuple[list[float], Batches]:
    """Open the reader so many times; how long each first batch took, and the last one's batches."""
    seconds: list[float] = []
    while True:
        began = time.perf_counter()
        batches = reader.open()
        next(batches)
        seconds.append(time.perf_counter() - began)
        if len(seconds) == starts:
            return seconds, batches
        batches.close()


def lap(batches: Batches, workers: int) -> Lap:
    for _ in range(PREFETCHED * workers):
        next(batches)
    cpu, began = cpu_seconds(), time.perf_counter()
    images = sum(next(batches) for _ in range(max(1, workers)))
    wall = time.perf_counter() - began
    return Lap(images, wall, cpu_seconds() - cpu)


def family() -> list[int]:
    """This process and those that it started."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [os.getpid(), *map(int, children)]


def cpu_seconds() -> float:
    """That this process and its workers have had of all cores."""
    return sum(time.clock_gettime(cpu_clock(pid)) for pid in family())


def cpu_clock(pid: int) -> int:
    """The clock of another process's CPU time, as glibc's clock_getcpuclockid makes it."""
    return (~pid << 3) | 2


def memory() -> int:
    """Bytes of this process and its workers; what they share is counted once."""
    return sum(proportional_bytes(Path(f"/proc/{pid}/smaps_rollup").read_text()) for pid in family())


def proportional_bytes(text: str) -> int:
    (line,) = (line for line in text.splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) * 1024
