"""Rotary position embedding on interleaved pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) by its token's angle.

    x: [B, T, H, D] queries or keys; cos, sin: [T, D], each angle held twice, for both members of its pair.
    The axes (1-D, 2-D) are the business of whoever makes the tables. Float32 arithmetic, result in x.dtype.
    """
    cos, sin = cos[:, None, :], sin[:, None, :]  # [T, 1, D]: the same for every head
    rotated = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return (x * cos + rotated * sin).to(x.dtype)
