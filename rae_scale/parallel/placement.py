"""Which part of a logical tensor a tensor-parallel rank holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rae_scale.parallel.boxes import Box, boxes_of_range, even_split, whole


@dataclass(frozen=True)
class Placement:
    """The part of a tensor of `shape` that rank `index` of `count` holds.

    dim:    dimension that is split, None for a tensor that every rank holds whole.
    groups: tensors packed along `dim`, such as query, key and value: each of them is split by itself, and a rank holds
            its parts one after the other. That is why a packed rank-local tensor is no plain slice of the logical one.
    Lengths need not divide by `count` (a vocabulary), but those of packed tensors do.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    groups: int = 1
    index: int = 0
    count: int = 1

    @property
    def is_split(self) -> bool:
        return self.dim is not None and self.count > 1

    @cached_property
    def parts(self) -> tuple[tuple[Box, Box], ...]:
        """(box in the local tensor, the same elements' box in the logical tensor), one pair per packed tensor."""
        if self.dim is None or self.count == 1:
            return ((whole(self.shape), whole(self.shape)),)
        length = self.shape[self.dim] // self.groups
        first, last = even_split(0, length, self.index, self.count)
        pairs = []
        for group in range(self.groups):
            local = self._along(group * (last - first), (group + 1) * (last - first))
            pairs.append((local, self._along(group * length + first, group * length + last)))
        return tuple(pairs)

    def _along(self, first: int, last: int) -> Box:
        """The whole tensor, of `dim` only `first` to `last`."""
        start, stop = [0] * len(self.shape), list(self.shape)
        start[self.dim or 0], stop[self.dim or 0] = first, last
        return Box(tuple(start), tuple(stop))

    @property
    def local_shape(self) -> tuple[int, ...]:
        return self.parts[-1][0].stop

    def slice(self, tensor: Tensor) -> Tensor:
        """This rank's part of the logical `tensor`, in memory of its own if it is split."""
        if not self.is_split:
            return tensor
        return torch.cat([tensor[logical.slices] for _, logical in self.parts], dim=self.dim or 0)

    def views(self, flat: Tensor, start: int, stop: int) -> Iterator[tuple[Box, Tensor]]:
        """`flat` [stop - start], elements of the local tensor, as (box of the logical tensor, view of that shape)."""
        offset = 0
        for run in boxes_of_range(self.local_shape, start, stop):
            block = flat[offset : offset + run.numel].view(run.shape)
            for local, logical in self.parts:
                common = run.intersect(local)
                if common is not None:
                    yield common.relative_to(local).placed_in(logical), block[common.relative_to(run).slices]
            offset += run.numel
