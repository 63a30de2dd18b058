"""RMSNorm and the two halves of adaptive layer norm (adaLN): modulation and the gated residual."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale `x` to unit root mean square over its last dimension, times `weight`.

    x: [..., C], weight: [C]. The arithmetic is float32 (float64 for float64 input) and is rounded once, to x.dtype:
    a mean of bfloat16 squares would lose most of its bits.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * inverse_rms * weight).to(x.dtype)


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum of the squares of `x` [..., C] over its last dimension, [..., 1], float32 (float64 for float64 input).

    With `rms_norm_from_sum` it is `rms_norm` for channels that are spread over several processes.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(dim=-1, keepdim=True)


def rms_norm_from_sum(x: Tensor, total: Tensor, channels: int, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` of a slice of the channels, given the sum of squares of all of them.

    x: [..., C] and weight: [C], of the slice; total: [..., 1], over all `channels`. Arithmetic and result as there.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(total / channels + eps) * weight).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift. All [B, T, C]: Scale-RAE's condition is per token. Ordinary type promotion."""
    return x * (1 + scale) + shift


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y, the residual x [B, T, C] plus a branch's output. Ordinary type promotion."""
    return x + gate * y
