"""Twins of the layers of a model for tensor parallelism: each holds this rank's part of the other's parameters.

Names of parameters stay what they are. A tensor is either whole on every rank or a slice along its last dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from rae_scale import ops
from rae_scale.models.blocks import NORM_EPS
from rae_scale.parallel.boxes import even_split
from rae_scale.parallel.collectives import Sum, SumBoth, SumGradient, in_autocast, start_all_reduce, wait
from rae_scale.parallel.tensor_linear import CopiedLinear, GatheredLinear, ScatteredLinear

if TYPE_CHECKING:
    from rae_scale.models.packed_llm import LogitsLoss


class ParallelLinear(nn.Module):
    """What the parallel linear layers have in common: the parameters."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.group = group


class ColumnLinear(ParallelLinear):
    """Output channels are split; the input is whole, and whoever made it sums its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class CopyColumnLinear(ParallelLinear):
    """Output channels are split; the input is whole, and its gradient is summed here."""

    def forward(self, x: Tensor, loss: LogitsLoss | None = None) -> Tensor:
        """`loss` as `models.packed_llm.OutputLayer` takes it."""
        return self.product(x) if loss is None else loss(self.product, x)

    def product(self, x: Tensor) -> Tensor:
        flat, weight, bias = in_autocast(x.flatten(0, -2), self.weight, self.bias)
        return CopiedLinear.apply(flat, weight, bias, self.group).view(*x.shape[:-1], -1)


class GatherColumnLinear(ParallelLinear):
    """Output channels are split; the input is a slice, which is gathered."""

    def forward(self, x: Tensor) -> Tensor:
        flat, weight, bias = in_autocast(x.flatten(0, -2), self.weight, self.bias)
        return GatheredLinear.apply(flat, weight, bias, self.group).view(*x.shape[:-1], -1)


class ScatterRowLinear(ParallelLinear):
    """Input channels are split; of the summed output each rank keeps its slice. So the bias is a slice."""

    def forward(self, x: Tensor) -> Tensor:
        flat, weight, bias = in_autocast(x.flatten(0, -2), self.weight, self.bias)
        y = ScatteredLinear.apply(flat, weight, self.group).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


class SumRowLinear(ParallelLinear):
    """Input channels are split; the summed output is whole on every rank. So is the bias."""

    def forward(self, x: Tensor) -> Tensor:
        y = Sum.apply(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class SlicedNorm(nn.Module):
    """What norms of slices have in common: one float32 number per token is summed over the ranks."""

    def __init__(self, weight: nn.Parameter, group: dist.ProcessGroup, channels: int) -> None:
        super().__init__()
        self.weight = weight
        self.group = group
        self.channels = channels

    def modulated(self, x: Tensor, total: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        total = SumBoth.apply(total, self.group)
        return ops.norm_modulate_from_sum(x, total, self.channels, self.weight, shift, scale, NORM_EPS)


class SlicedModulatedRMSNorm(SlicedNorm):
    """`models.blocks.ModulatedRMSNorm` of slices."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.modulated(x, ops.sum_of_squares(x), shift, scale)


class SlicedResidualModulatedRMSNorm(SlicedNorm):
    """`models.blocks.ResidualModulatedRMSNorm` of slices."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x, total = ops.gated_residual_sum(x, y, gate)
        return x, self.modulated(x, total, shift, scale)


class SharedHeadNorm(nn.Module):
    """`models.blocks.HeadNorm` with one weight for the heads of all ranks: its gradient is summed over them."""

    def __init__(self, weight: nn.Parameter, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight = weight
        self.group = group

    def forward(self) -> Tensor:
        return SumGradient.apply(self.weight, self.group)


class VocabularyEmbedding(nn.Module):
    """Rows of the vocabulary are split; ids of other ranks' rows give zero here, and the sum is whole on every rank."""

    def __init__(self, weight: nn.Parameter, group: dist.ProcessGroup, vocab_size: int) -> None:
        super().__init__()
        self.weight = weight
        self.group = group
        self.num_embeddings = vocab_size
        self.first, self.stop = even_split(0, vocab_size, dist.get_rank(group), dist.get_world_size(group))

    def forward(self, ids: Tensor) -> Tensor:
        here = (ids >= self.first) & (ids < self.stop)
        rows = F.embedding(torch.where(here, ids - self.first, 0), self.weight)
        return Sum.apply(torch.where(here[..., None], rows, 0.0), self.group)


class VocabularyCrossEntropy:
    """`ops.cross_entropy_sum` on logits of which each rank holds the columns of its part of the
    vocabulary: three numbers per row are exchanged, no logits."""

    def __init__(self, group: dist.ProcessGroup, vocab_size: int, ignore_label: int) -> None:
        self.group = group
        self.first, _ = even_split(0, vocab_size, dist.get_rank(group), dist.get_world_size(group))
        self.ignore_label = ignore_label

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits: [N, V / n] of this rank; targets: int64 [N]. The sum over rows, float32 scalar, equal on all ranks.

        log(sum exp) - logit of the target, with the row's largest logit taken off both. Where the maximum is does not
        matter to the result, so no gradient flows through it.
        """
        logits = logits.float()
        with torch.no_grad():
            largest = wait(start_all_reduce(logits.amax(1), self.group, "max"))
        shifted = logits - largest[:, None]
        place = targets - self.first
        here = (place >= 0) & (place < logits.shape[1])
        of_target = shifted.gather(1, torch.where(here, place, 0)[:, None])[:, 0]
        local = torch.stack([shifted.exp().sum(1), torch.where(here, of_target, 0.0)])
        total, of_target = Sum.apply(local, self.group)
        return torch.where(targets == self.ignore_label, 0.0, total.log() - of_target).sum()
