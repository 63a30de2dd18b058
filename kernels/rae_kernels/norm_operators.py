"""The custom operators behind `rae_kernels.norm`, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rae_kernels.chunks import gradient_like, storage_of
from rae_kernels.dispatch import operation, wide
from rae_kernels.spec import norm as spec

TRITON = "rae_kernels.triton_impl.norm"


@operation(f"{TRITON}:norm")
def norm(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    total: Tensor | None,
    channels: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """RMSNorm, modulated if there are shift and scale, of the row itself or of a `total`: (h, 1 / rms [..., 1])."""
    return spec.norm_forward(x, weight, shift, scale, total, channels, eps, dtype)


@operation(f"{TRITON}:norm_backward", mutates_args=("for_shift", "for_scale"))
def norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    factor: Tensor,
    for_shift: Tensor | None,
    for_scale: Tensor | None,
    from_total: bool,
    channels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and total (empty without one); those of shift and scale are written where they belong."""
    for_x, for_weight, of_shift, of_scale, for_total = spec.norm_backward(
        gradient, x, weight, scale, factor, from_total, channels
    )
    if for_shift is not None and for_scale is not None:
        for_shift.copy_(of_shift)
        for_scale.copy_(of_scale)
    return for_x.to(x.dtype), for_weight.to(weight.dtype), for_total if from_total else factor.new_empty(0)


@operation(f"{TRITON}:gated_residual")
def gated_residual(x: Tensor, y: Tensor, gate: Tensor, with_sum: bool) -> tuple[Tensor, Tensor]:
    """x + gate * y, and the sum of its squares [..., 1] (empty if not asked for)."""
    out = spec.residual_forward(x, y, gate, residual_dtype(x, y, gate))
    return out, spec.sum_of_squares(out) if with_sum else wide(out).new_empty(0)


@operation(f"{TRITON}:gated_residual_backward", mutates_args=("for_gate",))
def gated_residual_backward(
    gradient: Tensor, for_sum: Tensor | None, x: Tensor | None, y: Tensor, gate: Tensor, for_gate: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y. Without a sum that of x is `gradient` itself, and empty here."""
    total = wide(gradient)
    if for_sum is not None and x is not None:
        total = total + 2 * for_sum * wide(spec.residual_forward(x, y, gate, gradient.dtype))
    for_gate.copy_(total * wide(y))
    for_y = (total * wide(gate)).to(y.dtype)
    return (gradient.new_empty(0) if x is None else total.to(x.dtype)), for_y


@operation(f"{TRITON}:gated_residual_norm")
def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + gate * y, its modulated norm h, 1 / rms [..., 1])."""
    out = spec.residual_forward(x, y, gate, residual_dtype(x, y, gate))
    return out, *spec.norm_forward(out, weight, shift, scale, None, x.shape[-1], eps, dtype)


@operation(f"{TRITON}:gated_residual_norm_backward", mutates_args=("for_gate", "for_shift", "for_scale"))
def gated_residual_norm_backward(
    for_out: Tensor,
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    factor: Tensor,
    for_gate: Tensor,
    for_shift: Tensor,
    for_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and weight; those of gate, shift and scale are written where they belong."""
    out = spec.residual_forward(x, y, gate, for_out.dtype)
    through_norm, for_weight, of_shift, of_scale, _ = spec.norm_backward(
        gradient, out, weight, scale, factor, False, x.shape[-1]
    )
    total = wide(for_out) + through_norm
    for_shift.copy_(of_shift)
    for_scale.copy_(of_scale)
    for_gate.copy_(total * wide(y))
    return total.to(x.dtype), (total * wide(gate)).to(y.dtype), for_weight.to(weight.dtype)


@operation(f"{TRITON}:sum_of_squares")
def sum_of_squares(x: Tensor) -> Tensor:
    """Over the last dimension, kept: [..., 1]."""
    return spec.sum_of_squares(x)


@operation(f"{TRITON}:sum_of_squares_backward")
def sum_of_squares_backward(for_sum: Tensor, x: Tensor) -> Tensor:
    return (2 * for_sum * wide(x)).to(x.dtype)


def residual_dtype(x: Tensor, y: Tensor, gate: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), gate.dtype)


def one_per_row(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], 1, dtype=torch.promote_types(x.dtype, torch.float32))


@norm.register_fake
def _(
    x: Tensor, weight: Tensor, shift: Any, scale: Any, total: Any, channels: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), one_per_row(x)


@norm_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Any,
    factor: Tensor,
    for_shift: Any,
    for_scale: Any,
    from_total: bool,
    channels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), factor.new_empty(factor.shape if from_total else 0)


@gated_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, with_sum: bool) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=residual_dtype(x, y, gate))
    return out, one_per_row(out) if with_sum else wide(out).new_empty(0)


@gated_residual_backward.register_fake
def _(
    gradient: Tensor, for_sum: Any, x: Tensor | None, y: Tensor, gate: Tensor, for_gate: Tensor
) -> tuple[Tensor, Tensor]:
    return gradient.new_empty(0) if x is None else x.new_empty(x.shape), y.new_empty(y.shape)


@gated_residual_norm.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=residual_dtype(x, y, gate))
    return out, x.new_empty(x.shape, dtype=dtype), one_per_row(out)


@gated_residual_norm_backward.register_fake
def _(for_out: Tensor, gradient: Tensor, x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, *rest: Tensor) -> Any:
    return x.new_empty(x.shape), y.new_empty(y.shape), weight.new_empty(weight.shape)


@sum_of_squares.register_fake
def _(x: Tensor) -> Tensor:
    return one_per_row(x)


@sum_of_squares_backward.register_fake
def _(for_sum: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def shift_for_backward(shift: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """`shift` if keeping it costs nothing, as for chunks of one tensor: backward needs only its place there."""
    if shift is None or scale is None or storage_of(shift) is None:
        return None
    return shift if storage_of(shift) == storage_of(scale) else None


def gradient_of_shift(shift: Tensor | None, dtype: torch.dtype, scale: Tensor) -> Tensor:
    return scale.new_empty(scale.shape, dtype=dtype) if shift is None else gradient_like(shift)


def keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, shift, scale, total, ctx.channels, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, shift_for_backward(shift, scale), scale, output[1])
    ctx.from_total = total is not None
    ctx.shift_dtype = None if shift is None else shift.dtype


def differentiate_norm(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, shift, scale, factor = ctx.saved_tensors
    for_shift = for_scale = None
    if scale is not None:
        for_shift, for_scale = gradient_of_shift(shift, ctx.shift_dtype, scale), gradient_like(scale)
    for_x, for_weight, for_total = norm_backward(
        gradient, x, weight, scale, factor, for_shift, for_scale, ctx.from_total, ctx.channels
    )
    return for_x, for_weight, for_shift, for_scale, for_total if ctx.from_total else None, None, None, None


def keep_gated_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, gate, ctx.with_sum = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(x if ctx.with_sum else None, y, gate)


def differentiate_gated_residual(ctx: Any, gradient: Tensor, for_sum: Tensor) -> tuple[Tensor | None, ...]:
    x, y, gate = ctx.saved_tensors
    for_gate = gradient_like(gate)
    for_x, for_y = gated_residual_backward(gradient, for_sum if ctx.with_sum else None, x, y, gate, for_gate)
    return for_x if ctx.with_sum else gradient.to(ctx.x_dtype), for_y, for_gate, None


def keep_gated_residual_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, gate, weight, shift, scale, _, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, y, gate, weight, shift_for_backward(shift, scale), scale, output[2])
    ctx.shift_dtype = shift.dtype


def differentiate_gated_residual_norm(ctx: Any, for_out: Tensor, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, y, gate, weight, shift, scale, factor = ctx.saved_tensors
    for_gate, for_scale = gradient_like(gate), gradient_like(scale)
    for_shift = gradient_of_shift(shift, ctx.shift_dtype, scale)
    for_x, for_y, for_weight = gated_residual_norm_backward(
        for_out, gradient, x, y, gate, weight, scale, factor, for_gate, for_shift, for_scale
    )
    return for_x, for_y, for_gate, for_weight, for_shift, for_scale, None, None


def keep_sum_of_squares(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def differentiate_sum_of_squares(ctx: Any, for_sum: Tensor) -> Tensor:
    return sum_of_squares_backward(for_sum, *ctx.saved_tensors)


norm.register_autograd(differentiate_norm, setup_context=keep_norm)
gated_residual.register_autograd(differentiate_gated_residual, setup_context=keep_gated_residual)
gated_residual_norm.register_autograd(differentiate_gated_residual_norm, setup_context=keep_gated_residual_norm)
sum_of_squares.register_autograd(differentiate_sum_of_squares, setup_context=keep_sum_of_squares)
