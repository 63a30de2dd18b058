"""Work that needs no splitting, shared out by samples among the ranks that have the same ones."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from rae_scale.parallel.collectives import start_all_gather, wait
from rae_scale.parallel.mesh import Mesh


def share_samples(encode: Callable[[Tensor], Tensor], mesh: Mesh) -> Callable[[Tensor], Tensor]:
    """`encode`, [B, ...] to [B, ...] sample by sample and without gradient, with the work shared over sp x tp.

    Those ranks have the same samples; a frozen encoder is too small to be worth splitting, and without this each rank
    would encode all of them. Every rank encodes B / (sp x tp) samples, rounded up with zeros, and gets all results.
    """
    group = mesh.sample_group
    if group is None:
        return encode

    def shared(samples: Tensor) -> Tensor:
        size = -(-len(samples) // group.size())
        mine = samples[mesh.sample_rank * size :][:size]
        mine = F.pad(mine, (0, 0) * (mine.ndim - 1) + (0, size - len(mine)))
        return wait(start_all_gather(encode(mine), group)).flatten(0, 1)[: len(samples)]

    return shared
