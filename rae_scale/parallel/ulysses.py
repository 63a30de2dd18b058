"""Ulysses sequence parallelism (arXiv 2309.14509): each rank has a slice of the tokens, and for attention a slice of
the heads.

Everything but attention works on tokens one by one, so only attention exchanges: one all-to-all before it, of queries,
keys and values together, and one after it. Rotary embedding is applied before, by position.

Letters: B samples, L tokens in all, P of them on this rank, H heads, D channels of a head, n ranks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rae_scale import ops
from rae_scale.models.blocks import AttentionFn
from rae_scale.parallel.collectives import AllToAll, ReduceScatter, start_all_gather, wait

if TYPE_CHECKING:
    from rae_scale.models.packed_llm import PackedAttention


class TokenSlice:
    """`models.tokens.Tokens`: the `rank`-th of n equal runs of every sequence."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def padded(self, length: int) -> int:
        return length + -length % self.count

    def first(self, length: int) -> int:
        if length % self.count:
            raise ValueError(
                f"parallel.sp={self.count} does not divide a sequence of {length} tokens; choose a divisor of {length}"
            )
        return self.rank * (length // self.count)

    def positions(self, length: int, device: torch.device) -> Tensor:
        first = self.first(length)
        return torch.arange(first, first + length // self.count, device=device)

    def share(self, parts: Tensor) -> Tensor:
        return ReduceScatter.apply(parts.unflatten(1, (self.count, -1)).transpose(0, 1), self.group)

    def collect(self, here: Tensor) -> Tensor:
        """Without a gradient: sampling needs none."""
        return wait(start_all_gather(here.detach(), self.group)).transpose(0, 1).flatten(1, 2)


class UlyssesAttention:
    """Gives `attention` all tokens of some heads, where the caller has some tokens of all heads."""

    def __init__(self, attention: AttentionFn, group: dist.ProcessGroup) -> None:
        self.attention = attention
        self.group = group

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B, P, H, D]; k, v: [B, P, Hk, D] with H a multiple of Hk and of n. Returns [B, P, H, D]."""
        q, k, v = heads_for_tokens([q, k, v], self.group)
        return tokens_for_heads(self.attention(q, k, v), self.group)


def heads_for_tokens(tensors: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """[B, P, H_i, D] each, to [B, L, H_i / n, D] each, in one all-to-all.

    Heads of keys and values that are fewer than ranks are repeated first, as often as it takes to give each rank its
    own, so that queries still find theirs.
    """
    count = dist.get_world_size(group)
    cut = []
    for tensor in tensors:
        repeats = count // math.gcd(count, tensor.shape[2])
        cut.append(tensor.repeat_interleave(repeats, dim=2).unflatten(2, (count, -1)))  # [B, P, n, H_i / n, D]
    sent = torch.cat(cut, dim=3).permute(2, 0, 1, 3, 4)
    received = AllToAll.apply(sent, group)  # [n, B, P, ...]: the tokens of each rank
    tokens = received.transpose(0, 1).flatten(1, 2)
    return list(tokens.split([part.shape[3] for part in cut], dim=2))


def tokens_for_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, L, H / n, D] to [B, P, H, D]."""
    count = dist.get_world_size(group)
    sent = x.unflatten(1, (count, -1)).transpose(0, 1)  # [n, B, P, H / n, D]
    received = AllToAll.apply(sent, group)  # the heads of each rank
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


class PackedUlyssesAttention:
    """`UlyssesAttention` for the packed sequences of a language model."""

    def __init__(self, attention: PackedAttention, group: dist.ProcessGroup) -> None:
        self.attention = attention
        self.group = group

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sequences: ops.Sequences, mask: Tensor | None, scale: float
    ) -> Tensor:
        """`models.packed_llm.PackedAttention`. Which of this rank's key heads a query head reads follows from their
        numbers, as without slices."""
        q, k, v = heads_for_tokens([q, k, v], self.group)
        return tokens_for_heads(self.attention(q, k, v, sequences, mask, scale), self.group)


def slice_qwen2(llm: nn.Module, group: dist.ProcessGroup) -> None:
    """Let every attention layer of a Qwen2 model (`models.qwen2`) exchange its heads over `group`, in place."""
    for layer in llm.model.layers:
        layer.self_attn.packed_attention = PackedUlyssesAttention(layer.self_attn.packed_attention, group)
