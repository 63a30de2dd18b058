"""The dimension-dependent shift of time (paper section 3.2): larger latents need more noise to hide as much."""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor

from rae_scale.config.schema import FlowConfig

Time = TypeVar("Time", float, Tensor)


def shift_alpha(dim: int, base_dim: int) -> float:
    """alpha = sqrt(m / n), for a latent of m = tokens x channels numbers and n = `base_dim`."""
    return math.sqrt(dim / base_dim)


def resolve_alpha(cfg: FlowConfig, dim: int) -> float:
    """The shift of a run: `flow.shift` where it is set, or else what the latent's dimension asks for."""
    return shift_alpha(dim, cfg.base_dim) if cfg.shift is None else cfg.shift


def shift_time(t: Time, alpha: float) -> Time:
    """t' = alpha t / (1 + (alpha - 1) t), for t in [0, 1], a float or a tensor of any shape.

    Written so that 0 and 1 map to exactly 0 and 1, and rounding never leaves [0, 1].
    """
    return alpha * t / (alpha * t + (1 - t))
