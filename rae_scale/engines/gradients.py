"""Norms and clipping of a gradient whose parts lie on different ranks: the same arithmetic for every engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rae_scale.engines.optimizer import GroupKey
from rae_scale.parallel import Mesh

CLIP_EPSILON = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`."""


def group_norms(gradients: Mapping[GroupKey, Sequence[Tensor]], mesh: Mesh) -> dict[str, float]:
    """L2 norm of each optimizer group's gradient, equal on all ranks.

    gradients: this rank's parts by parameter group; every rank names the same ones. Over the ranks of
    `mesh.norm_group`, each element of a parameter is there once, or on each tensor-parallel rank if that parameter is
    replicated over them: then it is counted once all the same. Costs one all-reduce of one number per parameter group.
    A norm beyond float32 is inf.
    """
    local = [torch.nn.utils.get_total_norm(parts).to(mesh.device) for parts in gradients.values()]
    # float64: squares of float32 norms would overflow at 1e19, and their sum should not depend on the layout.
    squares = torch.stack(local).double().square()
    # A share and not the first rank's alone: what is not finite on any of them must show.
    squares *= torch.tensor([1 / mesh.tp if key.replicated else 1.0 for key in gradients], device=mesh.device)
    if mesh.norm_group is not None:
        dist.all_reduce(squares, group=mesh.norm_group)
    sums: dict[str, float] = {}
    for key, square in zip(gradients, squares.tolist(), strict=True):
        sums[key.name] = sums.get(key.name, 0.0) + square
    return {name: math.sqrt(square) for name, square in sums.items()}


def total_norm(norms: Mapping[str, float]) -> float:
    """L2 norm of all groups together; not finite if any is not."""
    return math.sqrt(sum(norm * norm for norm in norms.values()))


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply a gradient of this norm by for a norm of at most `max_norm`: 1 if that holds already."""
    return min(max_norm / (norm + CLIP_EPSILON), 1.0)


@torch.no_grad()
def scale(gradients: Mapping[GroupKey, Sequence[Tensor]], factor: float) -> None:
    """Multiply the gradients in place."""
    if factor != 1:
        torch._foreach_mul_([part for parts in gradients.values() for part in parts], factor)
