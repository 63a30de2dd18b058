"""One function over many items in a few processes, a bounded number of results ahead."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from rae_scale.data.build.pool import end_with_builder

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 4


def in_processes(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`function(item)` for each item, in order. One worker is this process; otherwise `function` is pickled.

    Raises ValueError when a worker process is killed.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: at least one process has to do the work")
    if workers == 1:
        yield from map(function, items)
        return
    items = iter(items)
    # Spawned: a forked child of a process with running threads can deadlock.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin) as pool:
        try:
            waiting: list[Future[Result]] = [pool.submit(function, item) for item in islice(items, AHEAD * workers)]
            while waiting:
                result = waiting.pop(0).result()
                waiting += [pool.submit(function, item) for item in islice(items, 1)]
                yield result
        except BrokenProcessPool:
            raise ValueError(
                f"one of {workers} worker processes was killed, probably for want of memory; use fewer workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def begin() -> None:
    """In each worker: it ends with the process that started it, and by it alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_builder, daemon=True).start()
