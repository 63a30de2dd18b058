"""Fetches shards in the background, so that the read that needs them finds them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from threading import Condition, Event, Thread

from rae_scale.data.cache.check import DamagedShard
from rae_scale.data.cache.folder import NoRoom
from rae_scale.data.cache.locks import LockBusy
from rae_scale.data.cache.shards import ShardFiles

THREADS = 2
MAX_WAITING = 4096
CLOSE_SECONDS = 5.0


class Prefetcher:
    """Threads that are started with the first shard and end with `close()`, or with the process."""

    def __init__(self, shards: ShardFiles) -> None:
        self._shards = shards
        self._waiting: OrderedDict[int, None] = OrderedDict()
        self._changed = Condition()
        self._threads: list[Thread] = []
        self._working = 0
        self._closed = False

    def add(self, numbers: Iterable[int]) -> None:
        with self._changed:
            for number in numbers:
                if len(self._waiting) >= MAX_WAITING:
                    break
                self._waiting.setdefault(number)
            self._changed.notify_all()
        while self._waiting and len(self._threads) < THREADS:
            # Daemons: a process that ends need not wait for a server that does not answer.
            self._threads.append(Thread(target=self._work, name="shard prefetch", daemon=True))
            self._threads[-1].start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until nothing is left to do. Returns whether that came to be."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._working, timeout_s)

    def close(self) -> None:
        # The shards themselves can still be read; whatever is being fetched for these threads ends.
        self._shards.closing.set()
        self._shards.closing = Event()
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
                if self._closed:
                    return
                number, _ = self._waiting.popitem(last=False)
                self._working += 1
            try:
                # Whatever goes wrong is met again, and said, by the read that needs the shard. Another process that
                # fetches it, or fills the cache with shards of its own, does not have to be waited for.
                with suppress(DamagedShard, LockBusy, NoRoom, ValueError, OSError):
                    self._shards.open(number, wait=False).close()
            finally:
                with self._changed:
                    self._working -= 1
                    self._changed.notify_all()
