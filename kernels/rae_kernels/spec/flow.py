"""The flow matching path, its noise and its loss in plain PyTorch: arithmetic in float32 (float64 for float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from rae_kernels.dispatch import wide
from rae_kernels.philox import SEED_BITS, philox_normal


def noise(
    seed: int, step: int, sample_index: Tensor, stream: int, first_token: int, tokens: int, channels: int
) -> Tensor:
    """eps of the tokens first_token ... first_token + tokens - 1 of each sample, float32 [B, tokens, C].

    seed: modulo 2**64, so that it may come as a signed 64-bit integer.
    """
    # A shorter sample is the beginning of a longer one: what follows these tokens need not be drawn.
    shape = (first_token + tokens, channels)
    return philox_normal(seed % 2**SEED_BITS, step, sample_index, shape, stream)[:, first_token:]


def flow_interpolate(x: Tensor, t: Tensor, sample_index: Tensor, seed: int, step: int, stream: int) -> Tensor:
    """(1 - t) x + t eps in the type of x: [B, T, C], t: [B]."""
    values = wide(x)
    eps = noise(seed, step, sample_index, stream, 0, *x.shape[1:])
    t = t.to(values.dtype)[:, None, None]
    return ((1 - t) * values + t * eps).to(x.dtype)


def difference(
    velocity: Tensor, x: Tensor, sample_index: Tensor, seed: int, step: int, stream: int, first_token: int
) -> Tensor:
    """v - (eps - x) [B, P, C], how far the velocity is from that of the path, in the type of the arithmetic."""
    tokens, channels = velocity.shape[1:]
    eps = noise(seed, step, sample_index, stream, first_token, tokens, channels)
    return wide(velocity) - (eps - wide(x[:, first_token : first_token + tokens]))


def mean_square(values: Tensor) -> Tensor:
    """Of each sample: [B, P, C] -> [B]."""
    return values.square().flatten(1).mean(dim=1)


def mean_square_backward(for_loss: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of `mean_square` at `values`, rounded to `dtype`, given that of its results [B]."""
    factor = for_loss * mean_square_slope(values)
    return (values * factor[:, None, None]).to(dtype)


def mean_square_slope(values: Tensor) -> float:
    """2 / (P * C), what a value's share in the gradient is multiplied by."""
    return 2 / max(1, values.shape[1] * values.shape[2])
