"""RMSNorm, modulation and gated residual in plain PyTorch.

First the functions as one would write them, which autograd differentiates; then the operators' specifications, whose
arithmetic is float32 (float64 for float64 tensors) and which round once, to the type of each result.

Letters: n = x / rms(x) the normalised row, r = 1 / rms(x) its factor, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rae_kernels.dispatch import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    values = wide(x)
    inverse_rms = torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
    return (values * inverse_rms * weight).to(x.dtype)


def sum_of_squares(x: Tensor) -> Tensor:
    return wide(x).square().sum(dim=-1, keepdim=True)


def rms_norm_from_sum(x: Tensor, total: Tensor, channels: int, weight: Tensor, eps: float) -> Tensor:
    return (wide(x) * torch.rsqrt(total / channels + eps) * weight).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate * y


def norm_forward(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    total: Tensor | None,
    channels: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """h = n * weight * (1 + scale) + shift in `dtype`, and r [..., 1]; the sum of squares is of x, or `total`."""
    values = wide(x)
    sum_squares = values.square().sum(dim=-1, keepdim=True) if total is None else total
    factor = torch.rsqrt(sum_squares / channels + eps)
    h = values * factor * wide(weight)
    if shift is not None and scale is not None:
        h = h * (1 + wide(scale)) + wide(shift)
    return h.to(dtype), factor


def norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    factor: Tensor,
    from_total: bool,
    channels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, shift, scale and total, all in the type of the arithmetic; `gradient` is that of h.

    Without `from_total` what x contributes through its own sum of squares is in the gradient of x, otherwise it is left
    to that of total.
    """
    gradient, normal = wide(gradient), wide(x) * factor
    open_gate = 1.0 if scale is None else 1 + wide(scale)
    inner = gradient * open_gate * wide(weight)  # of the normalised row
    along = (inner * normal).sum(dim=-1, keepdim=True)
    for_x = factor * inner if from_total else factor * (inner - normal * (along / channels))
    for_total = -0.5 * along * factor.square() / channels
    for_weight = (gradient * open_gate * normal).flatten(0, -2).sum(0)
    return for_x, for_weight, gradient, gradient * normal * wide(weight), for_total


def residual_forward(x: Tensor, y: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
    return (wide(x) + wide(gate) * wide(y)).to(dtype)
