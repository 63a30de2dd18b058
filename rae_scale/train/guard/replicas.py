"""Whether ranks that must hold the same parameters do: a flipped bit in one of them is in no loss curve.

Compared are checksums, bit by bit exact, over what the engine says is held more than once (`Engine.copies`): replicas
of FSDP2's hybrid sharding, the whole weights that ZeRO 1 and 2 compute with, and what tensor-parallel ranks do not
split. Where each element exists once, as in ZeRO 3, there is nothing to compare.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from rae_scale.engines import Engine
from rae_scale.parallel import Mesh
from rae_scale.train.callbacks.base import Callback, Metrics
from rae_scale.train.callbacks.checkpoint import save_is_due

if TYPE_CHECKING:
    from rae_scale.train.loop import Run

logger = logging.getLogger(__name__)
CHUNK = 1 << 22
"""Elements whose factors exist at once."""
FOLD = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
"""Odd constants (splitmix64) as int64; arithmetic wraps around."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MOST_NAMED = 5

Key = tuple[str, str, tuple[str | int, ...]]
"""Kind, parameter name, which part of it: equal on the ranks that must hold equal tensors."""


class ReplicasDrifted(ValueError):
    """Ranks that must hold the same parameters do not."""


class ReplicaCheck(Callback):
    """Compares before the first step, every `every` steps, and before each checkpoint, which is made of many ranks'
    parts: so every checkpoint is one of replicas that agree."""

    main_only = False

    def __init__(self, every: int) -> None:
        self.every = every
        self.step = 0
        """After which the last comparison was."""

    def on_train_start(self, run: Run) -> None:
        if run.mesh.is_main and run.mesh.world_size > 1:
            logger.info("%s", coverage(run.engine, run.config.engine.name))
        self.check(run)

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        if run.step % self.every == 0 or save_is_due(run):
            self.check(run)

    def on_train_end(self, run: Run) -> None:
        if run.step != self.step:  # a signal came, and a last checkpoint will be made
            self.check(run)

    def check(self, run: Run) -> None:
        check_replicas(run.engine, run.mesh)
        self.step = run.step


def coverage(engine: Engine, name: str) -> str:
    """Says once what the check cannot see."""
    compared = {copy.name for copy in engine.copies()}
    if not compared:
        return f"replica check: engine.name={name} holds each element once in this layout; a flipped bit would not show"
    if missing := sorted(set(engine.shapes) - compared):
        return (
            f"replica check: {len(compared)} of {len(engine.shapes)} parameters are held more than once and compared; "
            f"a flipped bit in the others ({missing[0]}, ...) would not show"
        )
    return f"replica check: all {len(compared)} parameters are held more than once and compared"


def check_replicas(engine: Engine, mesh: Mesh) -> None:
    """Compare what ranks hold alike. Collective: a checksum per tensor, one all-gather of one number per axis, and one
    all-reduce of one number.

    Raises:
        ReplicasDrifted: on all ranks, naming the ranks that differ from the majority, their hosts and the parameters.
    """
    copies = list(engine.copies())
    sums = checksums([copy.tensor for copy in copies], mesh.device)
    axes = sorted({axis for copy in copies for axis in copy.over})
    members = {axis: [i for i, copy in enumerate(copies) if axis in copy.over] for axis in axes}
    groups = {axis: mesh.copies_group(axis) for axis in axes}
    differ = [unlike(checksums([sums[members[axis]]], mesh.device), groups[axis]).any() for axis in axes]
    if not any(mesh.any(torch.stack(differ or [torch.zeros((), dtype=torch.bool, device=mesh.device)]))):
        return
    found: set[int] = set()
    for axis in axes:
        flags = unlike(sums[members[axis]], groups[axis]).tolist()
        found |= {number for number, flag in zip(members[axis], flags, strict=True) if flag}
    keys = [(copy.kind, copy.name, copy.part) for copy in copies]
    suspicious = set().union(*mesh.gather_objects({keys[number] for number in found}))
    ours = {key: value for key, value in zip(keys, sums.tolist(), strict=True) if key in suspicious}
    held = mesh.gather_objects((socket.gethostname(), ours))
    raise ReplicasDrifted(describe([host for host, _ in held], [values for _, values in held]))


def unlike(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """bool [n]: which of the int64 `values` [n] are not the same on all ranks of `group`."""
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, values.contiguous(), group=group)
    return (torch.stack(gathered) != values).any(dim=0)


def describe(hosts: Sequence[str], held: Sequence[Mapping[Key, int]]) -> str:
    """The ranks to blame and what for. held: per rank, checksums of the tensors that are not alike everywhere."""
    blamed: dict[tuple[int, ...], list[str]] = {}
    undecided: dict[tuple[int, ...], list[str]] = {}
    for key in sorted({key for values in held for key in values}, key=repr):
        holders = {rank: values[key] for rank, values in enumerate(held) if key in values}
        (usual, votes), *_ = Counter(holders.values()).most_common(1)
        kind, name, _ = key
        if 2 * votes > len(holders):
            ranks = tuple(rank for rank, value in holders.items() if value != usual)
            blamed.setdefault(ranks, []).append(f"{name} ({kind})")
        else:
            undecided.setdefault(tuple(holders), []).append(f"{name} ({kind})")

    def names(ranks: Sequence[int]) -> str:
        return ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)

    def some(parameters: Sequence[str]) -> str:
        more = f" and {len(parameters) - MOST_NAMED} more" if len(parameters) > MOST_NAMED else ""
        return ", ".join(parameters[:MOST_NAMED]) + more

    lines = [f"{names(r)}: other bits than the majority in {some(p)}" for r, p in blamed.items() if r]
    lines += [
        f"{names(r)}: different bits in {some(p)}; no majority tells which are right" for r, p in undecided.items()
    ]
    return (
        "replicas have drifted apart:\n  " + "\n  ".join(lines) + "\n"
        "No checkpoint was made of this state. Start the run again: it goes on from its last checkpoint, whose "
        "replicas agreed. A machine that is named a second time has faulty memory or a faulty link: leave it out"
    )


def checksums(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The checksum of each: int64 [n] on `device`."""
    factors: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        if tensor.device not in factors or len(factors[tensor.device]) < min(CHUNK, tensor.numel()):
            factors[tensor.device] = position_factors(min(CHUNK, tensor.numel()), tensor.device)
    values = [checksum(tensor, factors[tensor.device]).to(device) for tensor in tensors]
    return torch.stack(values) if values else torch.empty(0, dtype=torch.int64, device=device)


@torch.no_grad()
def checksum(tensor: Tensor, factors: Tensor) -> Tensor:
    """int64 [] on the tensor's device: sum over elements of (bits as an integer) * (an odd factor of the position).

    Modulo 2^64, where an odd factor loses nothing: a change of any one element always shows, one of several is missed
    with a chance of about 2^-64. Integer sums come out the same in any order, so on any device and kernel.

    factors: `position_factors` of at least as many elements as the tensor has, or of `CHUNK`.
    """
    bits = tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in bits.split(CHUNK):
        total = total * FOLD + (chunk * factors[: len(chunk)]).sum()
    return total


def position_factors(count: int, device: torch.device) -> Tensor:
    """Odd int64 [count] that look random."""
    mixed = torch.arange(1, count + 1, dtype=torch.int64, device=device) * FOLD
    for shift, factor in zip((30, 27), MIX, strict=True):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed ^ (mixed >> 31)) | 1
