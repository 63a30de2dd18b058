"""How latents are kept: bfloat16, or 8-bit integers with one scale per token."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

LatentDtype = Literal["bf16", "int8"]
TORCH_DTYPES: dict[LatentDtype, torch.dtype] = {"bf16": torch.bfloat16, "int8": torch.int8}
SCALE_BYTES = 4
INT8_MAX = 127


class Latents(NamedTuple):
    """Latents as they are kept; any number of leading dimensions.

    values: [..., T, C], bfloat16 or int8.
    scales: float32 [..., T], what a token's integers are multiples of; None beside bfloat16.
    """

    values: Tensor
    scales: Tensor | None


def quantise(latents: Tensor, dtype: LatentDtype) -> Latents:
    """Latents [..., T, C] of any floating dtype, rounded to the nearest that `dtype` holds.

    The error of an element is at most 2^-8 of it (bf16, 8 bits of precision), or 1/254 of the largest magnitude in its
    token (int8: half a step, of which there are 127).
    """
    if dtype == "bf16":
        return Latents(latents.to(torch.bfloat16), None)
    latents = latents.float()
    scales = latents.abs().amax(dim=-1) / INT8_MAX
    # A token of zeros has no scale to be divided by.
    steps = latents / scales.where(scales > 0, 1.0)[..., None]
    return Latents(steps.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scales)


def dequantise(values: Tensor, scales: Tensor | None) -> Tensor:
    """What `quantise` was given but for its rounding: float32 [..., T, C]."""
    return values.float() if scales is None else values.float() * scales[..., None]


def zeros(shape: tuple[int, int], dtype: LatentDtype) -> Latents:
    """What stands in a batch for a sample without an image. shape: (T, C)."""
    return Latents(torch.zeros(shape, dtype=TORCH_DTYPES[dtype]), torch.zeros(shape[0]) if dtype == "int8" else None)


def sample_bytes(num_tokens: int, channels: int, dtype: LatentDtype) -> int:
    """Of the latents of one image."""
    if dtype == "bf16":
        return num_tokens * channels * torch.bfloat16.itemsize
    return num_tokens * (channels + SCALE_BYTES)
