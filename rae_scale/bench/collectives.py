"""Time of one collective in one group, and the groups that a mesh has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist

from rae_scale.bench.timing import seconds_of
from rae_scale.parallel import Mesh
from rae_scale.parallel.ledger import AXES_OF, group_name, sizes_of

Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
COLLECTIVES: tuple[Collective, ...] = get_args(Collective)
FLOAT32 = 4

BURST_BYTES, MOST_CALLS = 4 * 2**20, 20
"""A timed region holds as many calls as move about this many bytes, but no more than that: ranks begin a region a few
microseconds apart, which one small call would be lost in."""


class Collected(NamedTuple):
    """payload: bytes of one call. seconds: of one call, in each repeat the slowest rank's. calls: in each repeat."""

    payload: int
    seconds: list[float]
    calls: int


def time_collective(
    kind: Collective,
    payload: int,
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    repeats: int = 20,
    warm_up: int = 5,
) -> Collected:
    """Time one collective of float32 numbers, out of place. Collective over all ranks of the run, whose groups of the
    same axes communicate at once, as they do in training.

    payload: bytes; rounded up, so that every rank has an equal part.
    """
    ranks = group.size()
    part = torch.zeros(-(-payload // (FLOAT32 * ranks)), device=device)
    whole, other = (torch.zeros(ranks * part.numel(), device=device) for _ in range(2))
    work: dict[Collective, Callable[[], object]] = {
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
    }
    calls = max(1, min(MOST_CALLS, BURST_BYTES // max(1, payload)))

    def burst() -> None:
        for _ in range(calls):
            work[kind]()

    # Ranks that begin at different times would measure how long they wait for each other.
    own = seconds_of([burst], device, repeats=repeats, warm_up=warm_up, before=lambda: dist.barrier())
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    seconds = [max(times) / calls for times in zip(*gathered, strict=True)]
    return Collected(whole.numel() * FLOAT32, seconds, calls)


def groups_of(mesh: Mesh) -> dict[str, dist.ProcessGroup]:
    """The groups of several ranks that this process belongs to, by the names of a ledger: each set of ranks once."""
    if mesh.device_mesh is None:
        return {}
    made = {
        "tp": mesh.tp_group,
        "sp": mesh.sp_group,
        "shard": mesh.device_mesh["shard"].get_group(),
        "replicate": mesh.device_mesh["replicate"].get_group(),
        "dp": mesh.dp_group,
        "sample": mesh.sample_group,
        "norm": mesh.norm_group,
        "world": dist.group.WORLD,
    }
    sizes = sizes_of(mesh)
    return {name: group for name, group in made.items() if group is not None and group_name(name, sizes) == name}


def ledger_name(name: str, mesh: Mesh) -> str:
    """The name that a ledger gives the group `name` of this mesh.

    Raises:
        ValueError: there is no such group, or it is one rank.
    """
    if name not in AXES_OF:
        raise ValueError(f"--group={name!r} is no group of a mesh; choose from {', '.join(AXES_OF)}")
    found = group_name(name, sizes_of(mesh))
    if found is None:
        axes = ", ".join(f"parallel.{axis}" for axis in AXES_OF[name])
        raise ValueError(f"--group={name} is a single rank in this layout; raise {axes}, or leave it out")
    return found
