"""Input files: what identifies one, and whether it is still the one that a unit was built from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

READ_BYTES = 2**18  # stays in the processor's cache while it is hashed


@dataclass(frozen=True)
class Input:
    """What is recorded of a file. hash: XXH3-128 of its bytes."""

    name: str
    bytes: int
    hash: str


class InputFile:
    """A file that is about to be read. Raises OSError when it is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = path.stat()

    @contextmanager
    def identified(self) -> Iterator[Input]:
        """Identify the file before the block reads it. Raises ValueError when it was written to meanwhile.

        The block's many small reads, in no order, are then answered by the page cache: the disk, or a server, sees one
        large read. (A thread that does this beside the block is no faster: the two get into each other's way.)
        """
        yield self.identify()
        self.check_unchanged()

    def identify(self) -> Input:
        digest = xxhash.xxh3_128()
        size = 0
        buffer = memoryview(bytearray(READ_BYTES))
        with open(self.path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
        return Input(self.path.name, size, digest.hexdigest())

    def check_unchanged(self) -> None:
        """Raises ValueError when the file was written to since this object was made."""
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) != (self.found.st_size, self.found.st_mtime_ns):
            raise ValueError(f"{self.path}: changed while it was read; build again when its writer is done")

    def is_still(self, recorded: Input, record: Path, *, always_hash: bool) -> bool:
        """Whether the file is the one that was recorded in the file `record`.

        By name and size, and by hash when it was written after `record`: the rule of `make`. It does not notice another
        file of the same name and size that has an older date; `always_hash` does.
        """
        if (self.path.name, self.found.st_size) != (recorded.name, recorded.bytes):
            return False
        if not always_hash and self.found.st_mtime_ns < record.stat().st_mtime_ns:
            return True
        if self.identify() != recorded:
            return False
        os.utime(record)  # from now on the dates are enough
        return True
