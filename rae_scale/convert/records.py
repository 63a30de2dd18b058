"""Checksums of records that are made while they are read, so that a file larger than memory is read once."""

from __future__ import annotations

import itertools
import os
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from isal import isal_zlib  # the checksums of zlib, many times as fast
from torch import Tensor

from rae_scale.convert.file_bytes import FileBytes, bytes_of, damaged
from rae_scale.state.format import CheckpointError

CHECKERS = min(8, os.cpu_count() or 1)  # threads
RECORDS_AT_A_TIME = 1024
KEPT_BYTES = 8 << 20


class Stretch(NamedTuple):
    start: int
    stop: int
    crc: int


class Checksum:
    """CRC-32 of bytes that come in parts, in whatever order. Of what comes twice, the first counts."""

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []
        """What has come: in order, with a gap between any two."""

    def add(self, start: int, data: memoryview) -> None:
        """data: the bytes from `start` on."""
        for first, stop in list(self.gaps(start, start + len(data))):
            self.insert(Stretch(first, stop, isal_zlib.crc32(data[first - start : stop - start])))

    def gaps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """What has not come of the bytes from `start` to `stop`."""
        first = bisect_right(self.stretches, start, key=lambda stretch: stretch.stop)
        for stretch in itertools.islice(self.stretches, first, None):
            if stretch.start >= stop:
                break
            if stretch.start > start:
                yield start, stretch.start
            start = stretch.stop
        if start < stop:
            yield start, stop

    def insert(self, new: Stretch) -> None:
        place = bisect_left(self.stretches, new.start, key=lambda stretch: stretch.start)
        first, last = place, place
        if first and self.stretches[first - 1].stop == new.start:
            first -= 1
            new = joined(self.stretches[first], new)
        if last < len(self.stretches) and self.stretches[last].start == new.stop:
            new = joined(new, self.stretches[last])
            last += 1
        self.stretches[first:last] = [new]

    @property
    def value(self) -> int:
        """Of all that has come, which must be without a gap."""
        assert len(self.stretches) <= 1
        return self.stretches[0].crc if self.stretches else 0


def joined(first: Stretch, second: Stretch) -> Stretch:
    crc = isal_zlib.crc32_combine(first.crc, second.crc, second.stop - second.start)
    return Stretch(first.start, second.stop, crc)


class Record:
    """`size` bytes of `file` from `start` on, with the checksum that they were written with."""

    def __init__(self, file: FileBytes, name: str, start: int, size: int, crc: int) -> None:
        self.file, self.name, self.start, self.size, self.crc = file, name, start, size, crc
        self.read = Checksum()
        self.kept = (0, 0)  # bytes that the system holds in memory since they were read

    def read_into(self, out: Tensor, position: int) -> None:
        """Fill `out`, contiguous, with the bytes from `position` on.

        Raises:
            CheckpointError: the file ends before.
        """
        self.file.read_into(out, self.start + position)
        self.take(position, bytes_of(out))

    def take(self, start: int, data: memoryview) -> None:
        self.read.add(start, data)
        first, stop = self.kept
        if start != stop:
            first = start
        stop = start + len(data)
        if stop - first >= KEPT_BYTES:
            self.file.forget(self.start + first, self.start + stop)
            first = stop
        self.kept = first, stop

    def contents(self) -> bytes:
        """All of it."""
        blocks = []
        for start, block in self.blocks(0, self.size):
            self.take(start, block)
            blocks.append(bytes(block))
        return b"".join(blocks)

    def check(self) -> None:
        """Compare with the checksum what was read, and what was not yet.

        Raises:
            CheckpointError: it is not what was written.
        """
        for gap in list(self.read.gaps(0, self.size)):
            for start, block in self.blocks(*gap):
                self.take(start, block)
        if self.read.value != self.crc:
            raise damaged(self.file.path, f"{self.name} is not what was written")

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, memoryview]]:
        """The bytes from `start` to `stop`, with where each block of them begins."""
        for block in self.file.blocks(self.start + start, self.start + stop):
            yield start, block
            start += len(block)


def check_all(records: Iterable[Record]) -> None:
    """Compare every byte of the records with their checksums, several of them at a time. What was read before is not
    read again.

    Raises:
        CheckpointError: names the first record that is not what was written.
    """
    records = iter(records)
    with ThreadPoolExecutor(CHECKERS) as pool:
        while some := list(itertools.islice(records, RECORDS_AT_A_TIME)):
            try:
                deque(pool.map(Record.check, some), maxlen=0)
            except CheckpointError:
                pool.shutdown(cancel_futures=True)
                raise
