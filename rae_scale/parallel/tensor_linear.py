"""Linear layers of which each tensor-parallel rank holds a part.

M tokens of this rank, n ranks, k input and o output channels of the whole layer. What overlaps: in the backward pass of
`GatheredLinear` the inputs are gathered again while their gradient's product is computed, and that gradient is reduced
and scattered while the weight's is computed; `CopiedLinear` sums it meanwhile. Only the slice of the input is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rae_scale.parallel.collectives import (
    side_by_side,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)


class GatheredLinear(torch.autograd.Function):
    """Slices of the input, gathered, times this rank's rows of the weight: [M, k / n] to [M, o / n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # only the weight's gradient reads x
        ctx.group, ctx.has_bias = group, bias is not None
        whole = side_by_side(wait(start_all_gather(x, group)))
        return whole @ weight.t() if bias is None else torch.addmm(bias, whole, weight.t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        gradient = gradient.contiguous()
        gathering = start_all_gather(x, ctx.group) if needs_weight else None
        scattering = None
        if needs_x:
            scattering = start_reduce_scatter(slices_of_product(gradient, weight, ctx.group.size()), ctx.group)
        for_weight = None
        if gathering is not None:
            for_weight = gradient.t() @ side_by_side(wait(gathering))
        for_bias = gradient.sum(0) if ctx.has_bias and needs_bias else None
        return wait(scattering)[0] if scattering is not None else None, for_weight, for_bias, None


class CopiedLinear(torch.autograd.Function):
    """A whole input times this rank's rows of the weight: [M, k] to [M, o / n]; backward sums the input's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.group, ctx.has_bias = group, bias is not None
        return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        summing = start_all_reduce(gradient @ weight, ctx.group) if needs_x else None
        for_weight = gradient.t() @ x if needs_weight else None
        for_bias = gradient.sum(0) if ctx.has_bias and needs_bias else None
        return wait(summing) if summing is not None else None, for_weight, for_bias, None


class ScatteredLinear(torch.autograd.Function):
    """This rank's columns of the weight times its channels of the input, summed over ranks, and of the sum this rank's
    slice: [M, k / n] to [M, o / n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.group = group
        return wait(start_reduce_scatter(slices_of_product(x, weight.t(), group.size()), group))[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        whole = side_by_side(wait(start_all_gather(gradient, ctx.group)))
        return whole @ weight if needs_x else None, whole.t() @ x if needs_weight else None, None


def slices_of_product(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """x [M, k] @ weight [k, o], as `count` contiguous slices [count, M, o / count] of the columns.

    One batched product that writes what reduce-scatter sends; splitting [M, o] afterwards would copy it.
    """
    slices = weight.unflatten(1, (count, -1)).transpose(0, 1)
    return torch.bmm(x.expand(count, *x.shape), slices)
