"""Tensors where they lie in files, of which any box is read without loading the rest.

Files are read by offset and not mapped: mapped pages count as the process's memory, and files may be larger than that.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

import torch
from torch import Tensor

from rae_scale.parallel.boxes import Box, whole
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
        buffer = memoryview(out.view(-1).view(torch.uint8).numpy())
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

    def cut_off(self, position: int) -> CheckpointError:
        return CheckpointError(f"{self.path} is cut off at byte {self.start + position}; {AGAIN}")


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


@dataclass(frozen=True)
class Storage:
    """A record of a file, as elements. start: its first byte in the file."""

    file: FileBytes
    start: int
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: element [i, j, ...] is the storage's number offset + i * stride[0] + j * stride[1] ..."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, box: Box) -> Tensor:
        """The elements in `box`, contiguous.

        If they do not lie in the order of rows, everything between the first and the last of them is read as well.
        """
        out = torch.empty(box.shape, dtype=self.dtype)
        if not out.numel():
            return out
        if self.stride == row_major(self.shape):
            for start, flat in runs(self.shape, box, out.view(-1)):
                self.read_flat(start, flat)
            return out
        first = self.place(box.start)
        last = self.place([stop - 1 for stop in box.stop])
        span = torch.empty(last - first + 1, dtype=self.dtype)
        self.read_flat(first - self.offset, span)
        return out.copy_(span.as_strided(box.shape, self.stride))

    def read_flat(self, start: int, out: Tensor) -> None:
        """Fill `out` with the storage's elements from number offset + `start` on."""
        self.storage.file.read_into(out, self.storage.start + (self.offset + start) * self.dtype.itemsize)

    def whole(self) -> Tensor:
        return self.read(whole(self.shape))

    def place(self, index: Sequence[int]) -> int:
        return self.offset + sum(i * stride for i, stride in zip(index, self.stride, strict=True))


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, as torch gives them."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def runs(shape: Sequence[int], box: Box, out: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The stretches of `box` in which elements follow each other in a row-major tensor of `shape`: where each begins
    in the tensor, and its part of `out` [box.numel]."""
    stride = row_major(shape)
    outer = len(shape)  # the dimensions from here on are whole, and with the one before make one stretch
    while outer and (box.start[outer - 1], box.stop[outer - 1]) == (0, shape[outer - 1]):
        outer -= 1
    outer = max(outer - 1, 0)
    length = math.prod(box.shape[outer:])
    inner = sum(first * step for first, step in zip(box.start[outer:], stride[outer:], strict=True))
    indices = itertools.product(*map(range, box.start[:outer], box.stop[:outer]))
    for number, index in enumerate(indices):
        start = inner + sum(i * step for i, step in zip(index, stride, strict=False))
        yield start, out[number * length : (number + 1) * length]
