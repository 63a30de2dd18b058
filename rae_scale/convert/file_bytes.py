"""Files that are read by offset and not mapped: mapped pages count as the process's memory, and files may be larger."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, ClassVar

import torch
from torch import Tensor

from rae_scale.state.format import CheckpointError

MOST_OPEN = 256
BLOCK_BYTES = 1 << 20  # small enough for a core's own cache
AGAIN = "fetch or write it again"


class FileBytes:
    """A file, or `size` bytes of it from `start` on, read by offset. It is open while it is in use, and at most
    `MOST_OPEN` are: a checkpoint of a thousand ranks has more files than a process may open."""

    opened: ClassVar[OrderedDict[Path, IO[bytes]]] = OrderedDict()

    def __init__(
        self, path: Path, start: int = 0, size: int | None = None, *, unpacked: IO[bytes] | None = None
    ) -> None:
        """unpacked: the contents of `path`, where the file is a compressed one.

        Raises:
            CheckpointError: the file has not so many bytes.
        """
        self.path, self.start, self.unpacked = path, start, unpacked
        available = os.fstat(self.descriptor()).st_size - start
        self.size = available if size is None else size
        if self.size > available or start < 0 or self.size < 0:
            raise self.cut_off(available)

    def descriptor(self) -> int:
        if self.unpacked is not None:
            return self.unpacked.fileno()
        file = self.opened.pop(self.path, None) or self.path.open("rb")
        self.opened[self.path] = file
        while len(self.opened) > MOST_OPEN:
            self.opened.popitem(last=False)[1].close()
        return file.fileno()

    def close(self) -> None:
        file = self.unpacked or self.opened.pop(self.path, None)
        if file is not None:
            file.close()

    def read_into(self, out: Tensor, position: int) -> None:
        """Fill `out`, contiguous, with the bytes from `position` on.

        Raises:
            CheckpointError: the file ends before.
        """
        buffer = bytes_of(out)
        while len(buffer):
            count = os.preadv(self.descriptor(), [buffer], self.start + position)
            if count == 0:
                raise self.cut_off(position)
            buffer, position = buffer[count:], position + count

    def read(self, position: int, length: int) -> bytes:
        """At most `length` bytes from `position` on."""
        return os.pread(self.descriptor(), max(min(length, self.size - position), 0), self.start + position)

    def blocks(self, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes from `start` to `stop`, from a handle of its own: threads may do this at the same time. A block is
        gone when the next one comes."""
        descriptor = os.dup(self.unpacked.fileno()) if self.unpacked else os.open(self.path, os.O_RDONLY)
        buffer = memoryview(bytearray(min(BLOCK_BYTES, max(stop - start, 0))))
        try:
            while start < stop:
                count = os.preadv(descriptor, [buffer[: stop - start]], self.start + start)
                if count == 0:
                    raise self.cut_off(start)
                start += count
                yield buffer[:count]
        finally:
            os.close(descriptor)

    def forget(self, start: int, stop: int) -> None:
        """The system need not keep these bytes in memory: they have been read, and a file may be larger than memory.
        It would give up for them what others read, and clear new memory for each next one."""
        os.posix_fadvise(self.descriptor(), self.start + start, stop - start, os.POSIX_FADV_DONTNEED)

    def cut_off(self, position: int) -> CheckpointError:
        return CheckpointError(f"{self.path} is cut off at byte {self.start + position}; {AGAIN}")


def damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or cut off: {why}; {AGAIN}")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


class Stream(io.RawIOBase):
    """`FileBytes` as a file with a position, for libraries that want one."""

    def __init__(self, file: FileBytes) -> None:
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.file.size}[whence]
        if self.position < 0:
            raise OSError(f"there is no byte {self.position}")
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        found = self.file.read(self.position, self.file.size if size is None or size < 0 else size)
        self.position += len(found)
        return found
