"""Tensors where they lie in files, of which any box is read without loading the rest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rae_scale.convert.records import Record
from rae_scale.parallel.boxes import Box, whole


@dataclass(frozen=True)
class Storage:
    """A record, as elements."""

    record: Record
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
        self.storage.record.read_into(out, (self.offset + start) * self.dtype.itemsize)

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
