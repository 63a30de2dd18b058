"""Items of a dataset, made ahead by worker processes, in order.

PyTorch's DataLoader starts the processes and passes the items. It takes a killed worker for the end of everything: a
handler raises in the main thread, wherever that is. Since any item can be made again, here the workers are started anew
at the item that is missing: a kernel that was short of memory for a moment does not end a run of a thousand processes.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

logger = logging.getLogger(__name__)

T = TypeVar("T")

KILL_SECONDS = 5.0  # a process in the middle of a read from storage that is gone does not even die
DEATH_SECONDS = 1.0  # between the first sign of a process's death and its end
MAX_DEATHS = 3  # without an item in between; more are no accident


class WorkerDied(ValueError):
    """Data workers ended again and again. A run can go on from where it was when the cause is gone."""


class Workers(Generic[T]):
    """Iterator over the items whose numbers are `numbers(0)`, made by `num_workers` processes, or here if that is 0.

    numbers: the item numbers from the n-th on, endless.

    `next` raises what the dataset raises; WorkerDied within seconds, when workers are killed MAX_DEATHS times for the
    same item or one ends in another way. A worker that hangs is for the caller to notice: it may `close` from another
    thread than the one that waits.
    """

    def __init__(
        self, dataset: Dataset[T], numbers: Callable[[int], Iterator[int]], num_workers: int, pin_memory: bool = False
    ) -> None:
        self._dataset = dataset
        self._numbers = numbers
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._taken = 0
        self._deaths = 0  # since the last item
        self._closed = False
        self._changing = threading.Lock()
        self._items: Iterator[T] | None = None
        self._processes: list[BaseProcess] = []
        self._start()

    def __iter__(self) -> Workers[T]:
        return self

    def __next__(self) -> T:
        while True:
            if self._items is None:
                raise ValueError("these workers are closed")
            try:
                item = next(self._items)
            # What PyTorch says of a dead worker, and what becomes of an item that a dying one was handing over.
            except (RuntimeError, OSError, EOFError) as error:
                dead = self._dead()
                if not dead or self._closed:
                    raise
                causes = ", ".join(map(cause_of_death, dead))
                self._deaths += 1
                if self._deaths == MAX_DEATHS or any(process.exitcode != -signal.SIGKILL for process in dead):
                    raise WorkerDied(causes) from error
                logger.warning("%s. Its work is done again", causes)
            else:
                self._taken += 1
                self._deaths = 0
                return item
            with self._changing:
                if not self._closed:
                    self._kill()
                    self._start()

    def close(self) -> None:
        self._closed = True
        with self._changing:
            self._items = None  # the iterator owns the workers and joins them when it is dropped
            self._kill()  # those that it could not: a thread still waits for an item, and the worker for its storage

    def _start(self) -> None:
        items = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._numbers(self._taken),
            num_workers=self._num_workers,
            # A forked child of a process with CUDA or with running threads can deadlock.
            multiprocessing_context="spawn" if self._num_workers else None,
            worker_init_fn=leave_signals_to_the_run,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # otherwise it draws from the global one, which belongs to the model
        )
        others = multiprocessing.active_children()
        with keep_handler_of_dead_children():
            self._items = iter(items)
        self._processes = [child for child in multiprocessing.active_children() if child not in others]

    def _dead(self) -> Sequence[BaseProcess]:
        ended = wait([process.sentinel for process in self._processes], DEATH_SECONDS) if self._processes else []
        dead = [process for process in self._processes if process.sentinel in ended]
        for process in dead:
            process.join(DEATH_SECONDS)  # for its exit code
        return dead

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join(KILL_SECONDS)


@contextlib.contextmanager
def keep_handler_of_dead_children() -> Iterator[None]:
    """A dead worker is found when its item is asked for, not by PyTorch's handler in the midst of a collective."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


def cause_of_death(process: BaseProcess) -> str:
    status = process.exitcode or 0
    if status == -signal.SIGKILL:
        return (
            f"data worker {process.pid} was killed (SIGKILL). If nobody did, the machine ran out of memory: see dmesg, "
            "and lower data.num_workers or data.max_pixels"
        )
    how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    return f"data worker {process.pid} ended {how}; its last words are in the output of this process"


def leave_signals_to_the_run(worker: int) -> None:
    """For worker processes: a scheduler signals every process of a job, and the run needs its workers to finish a step.

    They end when the run closes its loader, or with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
