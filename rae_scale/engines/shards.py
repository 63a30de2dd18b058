"""The ranges of the parameters that a rank holds. Every engine describes its layout in this one form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rae_scale.engines.base import Kind, Piece
from rae_scale.parallel.boxes import Box
from rae_scale.parallel.placement import Placement

MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")


@dataclass
class Shard:
    """Elements `start` to `stop` of this rank's part of one parameter, in row-major order, and what is known of them.

    placement: which part of the parameter that is: all of it without tensor parallelism.
    tensors:   by kind, 1-D views [stop - start] of the engine's memory. A frozen parameter has its weight only. All are
               float32, but for moments that are kept in bfloat16.
    group:     optimizer group, None if frozen.
    owned:     the part of [start, stop) that this rank saves. Smaller than the whole where ranks hold copies.
    """

    name: str
    placement: Placement
    start: int
    stop: int
    group: str | None
    owned: tuple[int, int]
    tensors: dict[Kind, Tensor]

    @property
    def weight(self) -> Tensor:
        return self.tensors["weight"]

    def pieces(self) -> Iterator[Piece]:
        first, last = self.owned
        for kind, tensor in self.tensors.items():
            part = tensor[first - self.start : last - self.start]
            for box, view in self.placement.views(part, first, last):
                yield Piece(kind, self.name, self.placement.shape, box, view)

    def views(self, kind: Kind) -> Iterator[tuple[Box, Tensor]]:
        """All of this rank's elements, owned or not, as (box of the logical tensor, view of the engine's memory)."""
        return self.placement.views(self.tensors[kind], self.start, self.stop)


def add_ema(shards: list[Shard]) -> None:
    """Start a float32 moving average of every trainable shard at its weight."""
    for shard in shards:
        if shard.group is not None:
            shard.tensors["ema"] = shard.weight.detach().clone()


@torch.no_grad()
def update_ema(shards: list[Shard], decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * weight, on the local shards: no communication."""
    averaged = [shard for shard in shards if "ema" in shard.tensors]
    if averaged:
        torch._foreach_lerp_([s.tensors["ema"] for s in averaged], [s.weight for s in averaged], 1 - decay)


@torch.no_grad()
def exchange_ema(shards: list[Shard]) -> None:
    """Swap weights and moving averages, one shard at a time: twice gives back every bit, and memory does not grow."""
    for shard in shards:
        if "ema" in shard.tensors:
            average = shard.tensors["ema"].clone()
            shard.tensors["ema"].copy_(shard.weight)
            shard.weight.copy_(average)
