"""The custom operators behind `rae_kernels.flow`, with their gradients. `seed` is a signed 64-bit integer here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rae_kernels.dispatch import operation
from rae_kernels.spec import flow as spec

TRITON = "rae_kernels.triton_impl.flow"


@operation(f"{TRITON}:flow_interpolate")
def flow_interpolate(x: Tensor, t: Tensor, sample_index: Tensor, seed: int, step: int, stream: int) -> Tensor:
    """(1 - t) x + t eps, in the type of x [B, T, C]."""
    return spec.flow_interpolate(x, t, sample_index, seed, step, stream).contiguous()


@operation(f"{TRITON}:flow_matching_loss")
def flow_matching_loss(
    velocity: Tensor,
    x: Tensor,
    sample_index: Tensor,
    seed: int,
    step: int,
    stream: int,
    first_token: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(mean squared difference of each sample [B], the difference, not rounded; empty without `keep`)."""
    values = spec.difference(velocity, x, sample_index, seed, step, stream, first_token)
    return spec.mean_square(values), values.contiguous() if keep else values.new_empty(0)


@operation(f"{TRITON}:flow_matching_loss_backward")
def flow_matching_loss_backward(for_loss: Tensor, difference: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of velocity, in `dtype`; difference: [B, P, C], for_loss: [B]."""
    return spec.mean_square_backward(for_loss, difference, dtype)


def loss_dtype(velocity: Tensor, x: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(velocity.dtype, x.dtype), torch.float32)


@flow_interpolate.register_fake
def _(x: Tensor, t: Tensor, sample_index: Tensor, seed: int, step: int, stream: int) -> Tensor:
    return x.new_empty(x.shape)


@flow_matching_loss.register_fake
def _(
    velocity: Tensor,
    x: Tensor,
    sample_index: Tensor,
    seed: int,
    step: int,
    stream: int,
    first_token: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    loss = velocity.new_empty(velocity.shape[:1], dtype=loss_dtype(velocity, x))
    return loss, loss.new_empty(velocity.shape if keep else 0)


@flow_matching_loss_backward.register_fake
def _(for_loss: Tensor, difference: Tensor, dtype: torch.dtype) -> Tensor:
    return difference.new_empty(difference.shape, dtype=dtype)


def keep_difference(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def differentiate_loss(ctx: Any, for_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    gradient = flow_matching_loss_backward(for_loss, *ctx.saved_tensors, ctx.dtype)
    return gradient, *(None,) * 7


flow_matching_loss.register_autograd(differentiate_loss, setup_context=keep_difference)
