"""What ranks tell each other before they have a process group: through the store of rank 0, every wait bounded."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from pydantic import TypeAdapter

T = TypeVar("T")
SHORTEST = 0.001


class Board:
    """Entries under names; each is written once. Values are JSON, checked against the type that the reader expects."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def count(self, name: str) -> int:
        """A number from 0 that nobody else gets."""
        return int(self._store.add(name, 1)) - 1

    def write(self, name: str, value: object) -> None:
        self._store.set(name, TypeAdapter(type(value)).dump_json(value))

    def wait(self, name: str, seconds: float) -> None:
        """
        Raises:
            TimeoutError: nobody wrote it in time.
            ConnectionError: rank 0, which holds the board, has gone.
        """
        try:
            self._store.wait([name], timedelta(seconds=max(SHORTEST, seconds)))
        except dist.DistNetworkError as error:
            raise ConnectionError(f"rank 0 has ended or cannot be reached any more ({first_line(error)})") from None
        except dist.DistStoreError:
            raise TimeoutError(f"nobody wrote {name!r} within {seconds:.1f} s") from None

    def read(self, name: str, kind: type[T], seconds: float) -> T:
        """See `wait`."""
        self.wait(name, seconds)
        value: T = TypeAdapter(kind).validate_json(self._store.get(name))
        return value

    def read_all(self, names: dict[int, str], kind: type[T], seconds: float) -> dict[int, T]:
        """What was written under each of `names` (rank -> name) in time."""
        deadline = time.monotonic() + seconds
        found = {}
        for rank, name in names.items():
            try:
                found[rank] = self.read(name, kind, deadline - time.monotonic())
            except TimeoutError:
                continue
        return found


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
