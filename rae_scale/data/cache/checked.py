"""Which files have been checked, by this process or by one that shares the record with it.

Hashing a shard takes as long as decoding some dozens of its images. The workers of a rank all read all of its shards:
where each checked for itself, many workers would spend a good part of their time on it.
"""

from __future__ import annotations

import os
import struct
from io import FileIO
from multiprocessing.context import get_spawning_popen
from multiprocessing.sharedctypes import RawArray
from typing import Any

import xxhash


class CheckedFiles:
    """One word per shard, in memory that a process shares with those that it starts. Pickled otherwise, it is empty."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._words: Any = RawArray("Q", count)

    def knows(self, number: int, file: FileIO) -> bool:
        """Whether it was this very file, unchanged since, that was found good as shard `number`."""
        return bool(self._words[number] == identity(file))

    def add(self, number: int, file: FileIO) -> None:
        self._words[number] = identity(file)

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            return CheckedFiles, (self._count,)
        return shared, (self._count, self._words)


def shared(count: int, words: Any) -> CheckedFiles:
    record = CheckedFiles.__new__(CheckedFiles)
    record._count, record._words = count, words
    return record


def identity(file: FileIO) -> int:
    """64 bits that are others for another file, and for the same one after a change. Never 0."""
    state = os.fstat(file.fileno())
    return xxhash.xxh64_intdigest(struct.pack("<3q", state.st_ino, state.st_size, state.st_mtime_ns)) or 1
