"""Norms and clipping of a gradient whose parts lie on different ranks: the same arithmetic for every engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

CLIP_EPSILON = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`."""


def group_norms(
    gradients: Mapping[str, Sequence[Tensor]], group: dist.ProcessGroup | None, device: torch.device
) -> dict[str, float]:
    """L2 norm of each optimizer group's gradient, equal on all ranks.

    gradients: this rank's parts by optimizer group, each element on exactly one rank of the process group; every rank
    names the same optimizer groups. Costs one all-reduce of one number per group. A norm beyond float32 is inf.
    """
    local = [torch.nn.utils.get_total_norm(parts).to(device) for parts in gradients.values()]
    # float64: squares of float32 norms would overflow at 1e19, and their sum should not depend on the layout.
    squares = torch.stack(local).double().square()
    if group is not None:
        dist.all_reduce(squares, group=group)
    return dict(zip(gradients, squares.sqrt().tolist(), strict=True))


def total_norm(norms: Mapping[str, float]) -> float:
    """L2 norm of all groups together; not finite if any is not."""
    return math.sqrt(sum(norm * norm for norm in norms.values()))


@torch.no_grad()
def clip(gradients: Mapping[str, Sequence[Tensor]], norm: float, max_norm: float) -> None:
    """Scale the gradients in place so that their norm, which is `norm` now, is at most `max_norm`."""
    factor = max_norm / (norm + CLIP_EPSILON)
    if factor < 1:
        torch._foreach_mul_([part for parts in gradients.values() for part in parts], factor)
