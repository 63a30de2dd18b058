"""A language model's output layer and its cross-entropy, without all logits in memory at once.

A row of logits over 151,667 tokens weighs as much as 100 hidden states, and cross-entropy makes two more such rows. So
rows are taken in chunks: forward keeps nothing of a chunk but its loss, and backward computes its logits again, a third
more work for this layer. Where the rows fit into one chunk, nothing is computed twice.

The other way is to compute gradients during the forward pass, as the chunked torch.nn.functional.linear_cross_entropy
of recent versions and Liger's kernel do. It saves the second product, but keeps a gradient of the size of the weight
(930 MB in float32 for Qwen2.5 1.5B) until backward comes back to it, which in Scale-RAE is after the whole DiT, and it
cannot sum over slices of the vocabulary that several processes hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rae_kernels.dispatch import chosen

IGNORE_INDEX = -100
LOGITS_BYTES = 2**28
"""The float32 logits of a chunk take at most this much."""

Layer = Callable[[Tensor], Tensor]
CrossEntropy = Callable[[Tensor, Tensor], Tensor]
"""logits [M, V], targets int64 [M] -> float32 scalar, summed over M."""


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of the cross-entropy, float32 scalar. logits: [M, V]; targets: int64 [M], -100 where ignored."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def linear_cross_entropy(
    layer: Layer,
    hidden: Tensor,
    targets: Tensor,
    vocab_size: int,
    cross_entropy: CrossEntropy = cross_entropy_sum,
) -> Tensor:
    """cross_entropy(layer(hidden), targets), summed chunk by chunk of rows; float32 scalar.

    layer: [M, C] to logits [M, V]. hidden: [N, C]; targets: int64 [N].
    vocab_size: of the whole vocabulary, which decides the size of chunks: several processes that hold a slice of it
        each take the same chunks.
    """
    rows = rows_per_chunk(vocab_size)
    if len(targets) <= rows or chosen() == "reference":
        return cross_entropy(layer(hidden), targets)

    def loss_of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(layer(hidden), targets)

    # Nothing here draws random numbers, so there is no generator state to restore for the second forward.
    losses = [
        checkpoint(loss_of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(losses).sum()


def rows_per_chunk(vocab_size: int) -> int:
    return max(1, LOGITS_BYTES // (torch.float32.itemsize * vocab_size))
