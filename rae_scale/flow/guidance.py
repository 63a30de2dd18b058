"""Classifier-free guidance. The official numbers are unguided: its release returns the conditional velocity always."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# velocity(x [B, T, C], t [B]) -> [B, T, C]
VelocityFn = Callable[[Tensor, Tensor], Tensor]


def guided(
    velocity_cond: VelocityFn,
    velocity_uncond: VelocityFn,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> VelocityFn:
    """Return the velocity function uncond + scale * (cond - uncond) for times in `interval` (both ends included).

    Outside the interval the velocity is the conditional one. Only what is needed is evaluated: the conditional model
    alone at scale 1 and outside the interval, the unconditional one alone at scale 0 inside it.
    """
    if scale == 1.0:
        return velocity_cond
    low, high = interval

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        inside = (t >= low) & (t <= high)
        if not inside.any():
            return velocity_cond(x, t)
        if scale == 0.0 and inside.all():
            return velocity_uncond(x, t)
        cond = velocity_cond(x, t)
        uncond = velocity_uncond(x, t)
        inside = inside.view(-1, *(1,) * (x.dim() - 1))
        return torch.where(inside, uncond + scale * (cond - uncond), cond)

    return velocity
