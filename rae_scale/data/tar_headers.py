"""The headers of a tar file, one after the other.

`tarfile` reads them all, links and extensions and damage too, but takes longer for a header than it takes to copy a
small image. So the plain ones at the beginning, which are all there are in most archives, are read here.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO

# Long names and pax records precede a member as extra header data, which tarfile reads into memory in one piece.
MAX_HEADER_BYTES = 2**20

# Fields of a ustar header (POSIX.1-1988).
NAME, SIZE, CHECKSUM, TYPE, MAGIC = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157), slice(257, 262)
PREFIX_START = 345
TYPES = (tarfile.REGTYPE, tarfile.DIRTYPE)


class TarHeaders:
    """Iterate it once; raises what `tarfile` raises. `end` is then the offset after the last member."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file = file
        self.size = size
        self.end = 0

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        yield from self._plain()
        self.file.seek(self.end)
        with tarfile.TarFile(fileobj=BoundedFile(self.file), mode="r") as archive:  # type: ignore[arg-type]
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                yield info
            self.end = archive.offset

    def _plain(self) -> Iterator[tarfile.TarInfo]:
        """Up to the first member that is not plain, or whose data are cut off: that is left to `tarfile`."""
        descriptor = self.file.fileno()
        while (info := plain_header(os.pread(descriptor, tarfile.BLOCKSIZE, self.end))) is not None:
            info.offset = self.end
            info.offset_data = self.end + tarfile.BLOCKSIZE
            end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if end > self.size:
                return
            self.end = end
            yield info


def plain_header(block: bytes) -> tarfile.TarInfo | None:
    """A file or a folder with a short ASCII name and an octal size, the checksum right; None for all else."""
    name = block[NAME].partition(b"\0")[0]
    plain = (
        len(block) == tarfile.BLOCKSIZE
        and block[MAGIC] == b"ustar"
        and block[TYPE] in TYPES
        and block[PREFIX_START] == 0
        and name.isascii()
    )
    size, checksum = octal(block[SIZE]), octal(block[CHECKSUM])
    if (
        not plain
        or size is None
        or checksum is None
        or not has_sum(block, checksum - 8 * ord(" ") + sum(block[CHECKSUM]))
    ):
        return None
    info = tarfile.TarInfo(name.decode("ascii"))
    info.type = block[TYPE]
    info.size = size
    if info.isdir():
        info.name, info.size = info.name.rstrip("/"), 0
    return info


def has_sum(data: bytes, expected: int) -> bool:
    """Whether the bytes add up to a number, but for multiples of 65521: the lower half of Adler-32 is that sum plus
    one, and twenty times as fast as Python's."""
    return zlib.adler32(data) & 0xFFFF == (expected + 1) % 65521


def octal(field: bytes) -> int | None:
    digits = field.partition(b"\0")[0].strip()
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:
        return None


class BoundedFile:
    """The file as tarfile sees it: refuses header data of absurd length before it is read into memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"header data of {size} bytes (limit {MAX_HEADER_BYTES})")
        return self._file.read(size)
