"""The flow matching loss (paper section 3.1): mean squared error of the velocity, the same at every time."""

from __future__ import annotations

from torch import Tensor


def flow_loss(velocity: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, float32 [B]. velocity, target: [B, ...].

    weight: [B], multiplies each sample's loss (0 for a sample without an image). The batch is not averaged: a mean
    over ranks and micro-batches is a sum divided by a global count, which only the caller knows.
    Training computes it with `ops.flow_matching_loss`, which draws the target's noise itself.
    """
    per_sample = (velocity.float() - target.float()).square().flatten(1).mean(dim=1)
    return per_sample if weight is None else per_sample * weight
