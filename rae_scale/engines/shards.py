"""The ranges of the parameters that a rank holds. Every engine describes its layout in this one form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rae_scale.engines.base import Kind, Piece


@dataclass
class Shard:
    """Elements `start` to `stop` of one parameter, in row-major order, and what is known of them.

    tensors: by kind, 1-D views [stop - start] of the engine's memory. A frozen parameter has its weight only.
    group:   optimizer group, None if frozen.
    owned:   the part of [start, stop) that this rank saves. Smaller than the whole where ranks hold copies.
    """

    name: str
    shape: tuple[int, ...]
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
        if first == last:
            return
        for kind, tensor in self.tensors.items():
            part = tensor[first - self.start : last - self.start]
            yield Piece(kind, self.name, self.shape, first, last, part)


def even_split(start: int, stop: int, index: int, count: int) -> tuple[int, int]:
    """The `index`-th of `count` consecutive parts of [start, stop), as equal as they can be."""
    length = stop - start
    return start + length * index // count, start + length * (index + 1) // count


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
