"""The straight path between latents and noise (paper section 3.1), and the times at which it is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from rae_scale import ops
from rae_scale.config.schema import FlowConfig
from rae_scale.flow.noise import Stream
from rae_scale.flow.shift import shift_time


def sample_time(cfg: FlowConfig, seed: int, step: int, sample_index: Tensor, alpha: float) -> Tensor:
    """Training times t in [0, 1], float32 [B]: logit-normal(0, 1) or uniform, then shifted by `alpha`.

    The paper does not state the distribution; logit-normal is what the official release trains with.
    """
    if cfg.time == "logit_normal":
        t = torch.sigmoid(ops.philox_normal(seed, step, sample_index, (), Stream.TIME))
    else:
        t = ops.philox_uniform(seed, step, sample_index, (), Stream.TIME)
    return shift_time(t, alpha)


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t eps: data at t = 0, noise at t = 1. x, eps: [B, ...]; t: [B].

    Training computes it with `ops.flow_interpolate`, which draws eps itself.
    """
    t = t.view(-1, *(1,) * (x.dim() - 1))
    return (1 - t) * x + t * eps


def velocity_target(x: Tensor, eps: Tensor) -> Tensor:
    """v = dx_t/dt = eps - x, the same at every t. Shapes [B, ...]."""
    return eps - x
