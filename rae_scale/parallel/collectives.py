"""Collectives with their gradients: everything that tensor and sequence parallelism send.

Built on torch's functional collectives, so that a result can be waited for later than it was asked for, selective
activation checkpointing can keep it, and torch.compile can see through it. n is the size of the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_FUNCTIONAL = torch.ops._c10d_functional


def wait(tensor: Tensor) -> Tensor:
    """The result of a `start_...`, complete for whoever reads it from here on."""
    return _FUNCTIONAL.wait_tensor(tensor)


def start_all_reduce(x: Tensor, group: dist.ProcessGroup, operation: str = "sum") -> Tensor:
    return _FUNCTIONAL.all_reduce(x.contiguous(), operation, group.group_name)


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[M, ...] of each rank to [n, M, ...]."""
    gathered = _FUNCTIONAL.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
    return gathered.view(group.size(), *x.shape)


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, M, ...] of each rank: entry i is summed over the ranks and given to rank i, as [1, M, ...]."""
    return _FUNCTIONAL.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)


def start_all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ...] of each rank: entry i goes to rank i; what comes back is in the order of the ranks."""
    ones = [1] * group.size()
    return _FUNCTIONAL.all_to_all_single(x.contiguous(), ones, ones, group.group_name)


def side_by_side(parts: Tensor) -> Tensor:
    """[n, M, c], slices of the last dimension, to the whole [M, n * c]."""
    return parts.transpose(0, 1).flatten(1)


def in_autocast(*tensors: Tensor | None) -> list[Any]:
    """The tensors as autocast would hand them to a matrix product: it does not look into our autograd functions."""
    kind = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]


class SumGradient(torch.autograd.Function):
    """Identity; backward sums the gradient over the group.

    For a tensor that is whole on every rank and read by layers of which each rank has a part.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return wait(start_all_reduce(gradient, ctx.group)), None


class Sum(torch.autograd.Function):
    """Sum over the group; backward is the identity, for a result that every rank goes on with in the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return wait(start_all_reduce(x, group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class SumBoth(torch.autograd.Function):
    """Sum over the group, forward and backward: for a result that each rank applies to a slice of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return wait(start_all_reduce(x, group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return wait(start_all_reduce(gradient, ctx.group)), None


class AllToAll(torch.autograd.Function):
    """`start_all_to_all` of [n, ...]; it is its own inverse, so backward is the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return wait(start_all_to_all(x, group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return wait(start_all_to_all(gradient, ctx.group)), None


class ReduceScatter(torch.autograd.Function):
    """[n, ...] of each rank to the sum of everyone's entry for this rank, [...]; backward gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return wait(start_reduce_scatter(x, group))[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return wait(start_all_gather(gradient, ctx.group)), None
