"""Rectangular parts of tensors: the one language in which layouts of different engines and meshes are compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """The elements with start[d] <= index[d] < stop[d] in every dimension d of a tensor."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(last - first for first, last in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What indexes the tensor."""
        return tuple(slice(first, last) for first, last in zip(self.start, self.stop, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The elements in both; None if there are none."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(first >= last for first, last in zip(start, stop, strict=True)):
            return None
        return Box(start, stop)

    def relative_to(self, outer: Box) -> Box:
        """The same elements, counted from the corner of `outer`."""
        return self._moved(tuple(-first for first in outer.start))

    def placed_in(self, outer: Box) -> Box:
        """The inverse: this box is counted from the corner of `outer`, the result from where `outer` is."""
        return self._moved(outer.start)

    def _moved(self, by: tuple[int, ...]) -> Box:
        start = tuple(first + step for first, step in zip(self.start, by, strict=True))
        return Box(start, tuple(first + length for first, length in zip(start, self.shape, strict=True)))


def whole(shape: Sequence[int]) -> Box:
    """Every element of a tensor of `shape`."""
    return Box((0,) * len(shape), tuple(shape))


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The elements `start` to `stop` of a row-major tensor as boxes, in order: at most 2 * dimensions - 1 of them."""
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first, offset = divmod(start, row)
    last, rest = divmod(stop, row)
    if offset:
        end = min(row, stop - first * row)
        yield from _in_row(first, boxes_of_range(shape[1:], offset, end))
        first += 1
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last, *shape[1:]))
    if rest and first <= last:
        yield from _in_row(last, boxes_of_range(shape[1:], 0, rest))


def _in_row(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    for box in boxes:
        yield Box((row, *box.start), (row + 1, *box.stop))


def even_split(start: int, stop: int, index: int, count: int) -> tuple[int, int]:
    """The `index`-th of `count` consecutive parts of [start, stop), as equal as they can be."""
    length = stop - start
    return start + length * index // count, start + length * (index + 1) // count
