"""Where a token sits on the square latent grid: a fixed table added to the tokens, and 2-D rotary angles.

Tokens are row-major: token i of a `grid_size` x `grid_size` grid is in row i // grid_size, column i % grid_size.
Both tables are constants of the architecture, so they are built here and never trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROPE_THETA = 10_000.0
HEAD_DIM_MULTIPLE = 4  # rotary embedding turns pairs of channels, along two axes


def grid_coordinates(grid_size: int) -> tuple[Tensor, Tensor]:
    """Return the row and the column of every token, each float64 [T] with T = grid_size^2."""
    # The device is explicit everywhere in this file: tables stay real while a model is built on the meta device.
    tokens = torch.arange(grid_size**2, dtype=torch.float64, device="cpu")
    return tokens.div(grid_size, rounding_mode="floor"), tokens.remainder(grid_size)


def sincos_2d(hidden_size: int, grid_size: int) -> Tensor:
    """Fixed sin-cos position table, float32 [T, hidden_size]; the first half of the channels encodes the column.

    `hidden_size` must divide by 4: a sine and a cosine for each of two axes.
    """
    rows, columns = grid_coordinates(grid_size)
    return torch.cat([_sincos_1d(columns, hidden_size // 2), _sincos_1d(rows, hidden_size // 2)], dim=-1).float()


def _sincos_1d(positions: Tensor, channels: int) -> Tensor:
    half = channels // 2
    frequencies = 10_000.0 ** -(torch.arange(half, dtype=torch.float64, device="cpu") / half)
    angles = torch.outer(positions, frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rope_2d_tables(head_dim: int, grid_size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2-D rotary embedding (EVA style), each float32 [T, head_dim].

    The first half of a head turns with the token's row, the second half with its column; neighbouring channels
    (2i, 2i+1) form a rotated pair and so share an angle. `head_dim` must divide by 4.
    """
    per_axis = head_dim // 2
    exponents = torch.arange(0, per_axis, 2, dtype=torch.float64, device="cpu") / per_axis
    frequencies = ROPE_THETA**-exponents
    angles = torch.cat([torch.outer(axis, frequencies) for axis in grid_coordinates(grid_size)], dim=-1)
    angles = angles.repeat_interleave(2, dim=-1)
    return angles.cos().float(), angles.sin().float()
