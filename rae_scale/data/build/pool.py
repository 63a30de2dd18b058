"""Runs a job on units in several processes of this machine."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from rae_scale.data.build.failure import Failure
from rae_scale.data.build.units import Unit

R = TypeVar("R")

ATTEMPTS = 3
STOP_S = 5.0

logger = logging.getLogger(__name__)


def run_local(
    job: Callable[[Unit], R], units: Sequence[Unit], workers: int, on_result: Callable[[Unit, R], None]
) -> None:
    """Call `job` (picklable) on each unit, in up to `workers` processes; one works in this process.

    on_result: called here with each result, in the order in which they come.

    A worker that is killed is replaced and its unit tried again. Raises what `job` raised, after the other workers
    are stopped (see `Failure.error`); ValueError when a unit has lost three workers.
    """
    if workers == 1 or len(units) == 1:
        for each in units:
            on_result(each, job(each))
        return
    waiting = deque(units)
    losses: Counter[Unit] = Counter()
    crew = [start_worker(job) for _ in range(min(workers, len(units)))]
    try:
        while True:
            for worker in crew:
                if worker.unit is None and waiting:
                    worker.give(waiting.popleft())
            busy = {worker.connection: worker for worker in crew if worker.unit is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                unit = worker.take()
                try:
                    result = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    losses[unit] += 1
                    report_loss(worker, unit, losses[unit])
                    crew[crew.index(worker)] = start_worker(job)
                    waiting.appendleft(unit)
                else:
                    if isinstance(result, Failure):
                        raise result.error()
                    on_result(unit, result)
    finally:
        stop(crew)


@dataclass
class Worker:
    process: BaseProcess
    connection: Connection
    unit: Unit | None = None

    def give(self, unit: Unit) -> None:
        self.unit = unit
        with suppress(BrokenPipeError, ConnectionResetError):  # it died idle; reading from it says so
            self.connection.send(unit)

    def take(self) -> Unit:
        """The unit that it was given; it is free for another."""
        unit, self.unit = self.unit, None
        assert unit is not None
        return unit


def start_worker(job: Callable[[Unit], R]) -> Worker:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of other threads
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()  # so that its end is seen when the worker ends
    return Worker(process, ours)


def report_loss(worker: Worker, unit: Unit, times: int) -> None:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    message = f"worker {worker.process.pid} {how} while it worked on {unit.name} ({unit.path})"
    if times >= ATTEMPTS:
        raise ValueError(
            f"{message}, as did {times - 1} others; if it was out of memory, use fewer --workers or smaller shards"
        )
    logger.warning("%s; the unit is tried again (%d of %d)", message, times + 1, ATTEMPTS)


def stop(crew: Sequence[Worker]) -> None:
    """No worker outlives this; what one was writing is started over by the next build."""
    for worker in crew:
        worker.connection.close()
        worker.process.terminate()
    for worker in crew:
        worker.process.join(STOP_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.process.close()


def serve(job: Callable[[Unit], R], connection: Connection) -> None:
    """A worker's life: units in, results out, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the builder too, which stops its workers
    threading.Thread(target=end_with_builder, daemon=True).start()
    try:
        while True:
            unit = connection.recv()
            try:
                connection.send(job(unit))
            except Exception as error:
                connection.send(Failure.of(unit, error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def end_with_builder() -> None:
    """A builder that is killed leaves no workers behind."""
    builder = multiprocessing.parent_process()
    assert builder is not None
    wait([builder.sentinel])
    os._exit(1)
