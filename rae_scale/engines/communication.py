"""What one optimizer step of each engine sends: exact payloads in closed form, as a `Ledger` measures them.

Plain arithmetic on shapes: nothing here needs processes, a GPU or DeepSpeed. Counted are a step's forwards, backwards
and `Engine.step` in the steady state, with a gradient for every trainable parameter. Not counted are the layers' own
tensor- and sequence-parallel calls and what the training loop adds, such as its summed losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from rae_scale.config.schema import ParallelConfig
from rae_scale.engines.optimizer import GroupKey
from rae_scale.engines.zero_gathers import DEEPSPEED_LIMITS, Call, Zero3Limits, zero3_gathers
from rae_scale.parallel.checkpointing import blocks_of
from rae_scale.parallel.ledger import Kind, Volume, group_name, sizes_of
from rae_scale.parallel.placement import Placement

Precision = Literal["fp32", "bf16"]

FLOAT32, FLOAT64 = 4, 8
"""Bytes of an element."""


@dataclass(frozen=True)
class ParameterSpec:
    """shape: of the part that one tensor-parallel rank holds. group: its key in the optimizer, None if it is frozen."""

    name: str
    shape: tuple[int, ...]
    group: GroupKey | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together.

    root:     stays gathered from forward to backward, as torch's default is.
    backward: whether backward passes through it; not so below the first trainable parameter.
    """

    parameters: tuple[ParameterSpec, ...]
    root: bool = False
    backward: bool = True


def specs_of(
    module: nn.Module, group_of: Callable[[str], str], placements: Mapping[str, Placement] | None = None
) -> list[ParameterSpec]:
    """In the order of registration. The module's tensors may be on the meta device.

    placements: by name, on the rank in question, if there is tensor parallelism; the module is still whole.
    """
    specs = []
    for name, parameter in module.named_parameters():
        place = placements[name] if placements is not None else Placement(tuple(parameter.shape))
        key = GroupKey(group_of(name), place.count > 1 and not place.is_split) if parameter.requires_grad else None
        specs.append(ParameterSpec(name, place.local_shape, key))
    return specs


def units_of(module: nn.Module, specs: Iterable[ParameterSpec]) -> list[Unit]:
    """The units that the FSDP2 engine makes of `module`: one per transformer block, the rest is the root's."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    rest = {spec.name: spec for spec in specs}
    units = []
    for block in blocks_of(module):
        units.append(Unit(tuple(rest.pop(names[parameter]) for parameter in block.parameters())))
    return [*units, Unit(tuple(rest.values()), root=True)]


def fsdp2_volume(
    units: Sequence[Unit], parallel: ParallelConfig, precision: Precision = "fp32", micro_steps: int = 1
) -> Volume:
    """One step of the FSDP2 engine.

    Every micro-step gathers a block for forward and, since it is let go of in between, again for backward, and the root
    once. Activation checkpointing adds nothing: a block computes again while it is whole. Gradients are reduced in the
    last micro-step only, in float32.
    """
    shards = parallel.dp_shard * parallel.sp
    element = 2 if precision == "bf16" else FLOAT32
    volume: Volume = Volume()
    for unit in units:
        gathers = micro_steps * (1 if unit.root or not unit.backward else 2)
        held = sum(padded_rows(spec, shards) for spec in unit.parameters)
        reduced = sum(padded_rows(spec, shards) for spec in unit.parameters if spec.group is not None)
        add(volume, "all_gather", "shard", parallel, gathers * held * element)
        add(volume, "reduce_scatter", "shard", parallel, reduced * FLOAT32)
        add(volume, "all_reduce", "replicate", parallel, reduced // shards * FLOAT32)
    return volume + norms_volume([spec for unit in units for spec in unit.parameters], parallel)


def zero12_volume(
    specs: Sequence[ParameterSpec], stage: Literal[1, 2], parallel: ParallelConfig, micro_steps: int = 1
) -> Volume:
    """One step of DeepSpeed's stage 1 or 2, which are float32 in either precision of ours.

    It reduces gradients by all-reduces, of which each rank then uses its part: twice what reduce-scatters would send.
    Stage 1 does so in the last micro-step, stage 2 in all of them. Afterwards every optimizer group is gathered, laid
    end to end and padded to twice the number of ranks. Its own norm, which we do not use, is one float32 per group.
    """
    ranks = parallel.dp_replicate * parallel.dp_shard * parallel.sp
    groups = grouped(specs)
    reductions = micro_steps if stage == 2 else 1
    volume: Volume = Volume()
    for members in groups.values():
        numel = sum(spec.numel for spec in members)
        add(volume, "all_reduce", "dp", parallel, reductions * numel * FLOAT32)
        add(volume, "all_gather", "dp", parallel, padded(numel, 2 * ranks) * FLOAT32)
    for name in ("dp", "tp"):
        add(volume, "all_reduce", name, parallel, len(groups) * FLOAT32)
    return volume + norms_volume(specs, parallel)


def zero3_volume(
    specs: Sequence[ParameterSpec],
    root: Call,
    parallel: ParallelConfig,
    precision: Precision = "fp32",
    micro_steps: int = 1,
    limits: Zero3Limits = DEEPSPEED_LIMITS,
) -> Volume:
    """One step of DeepSpeed's stage 3.

    Every parameter is padded to the number of ranks. Gradients are reduce-scattered in every micro-step, in float32.
    How often a parameter is gathered is `zero3_gathers`'s; `root` comes from `record_calls` and says what activation
    checkpointing computes again. DeepSpeed's own norm is one float64 per flat buffer.
    """
    ranks = parallel.dp_replicate * parallel.dp_shard * parallel.sp
    element = 2 if precision == "bf16" else FLOAT32
    frozen = [spec.name for spec in specs if spec.group is None]
    gathers = zero3_gathers(root, {spec.name: spec.numel for spec in specs}, frozen, micro_steps, limits)
    volume: Volume = Volume()
    for spec in specs:
        add(volume, "all_gather", "dp", parallel, gathers[spec.name] * padded(spec.numel, ranks) * element)
        if spec.group is not None:
            add(volume, "reduce_scatter", "dp", parallel, micro_steps * padded(spec.numel, ranks) * FLOAT32)
    buffers = sum(flat_buffers(members, ranks, limits.sub_group) for members in grouped(specs).values())
    for name in ("dp", "tp"):
        add(volume, "all_reduce", name, parallel, buffers * FLOAT64)
    return volume + norms_volume(specs, parallel)


def norms_volume(specs: Iterable[ParameterSpec], parallel: ParallelConfig) -> Volume:
    """`engines.gradients.group_norms`: one float64 per optimizer group."""
    volume: Volume = Volume()
    add(volume, "all_reduce", "norm", parallel, len(grouped(specs)) * FLOAT64)
    return volume


def grouped(specs: Iterable[ParameterSpec]) -> dict[GroupKey, list[ParameterSpec]]:
    """The trainable parameters by optimizer group."""
    groups: dict[GroupKey, list[ParameterSpec]] = {}
    for spec in specs:
        if spec.group is not None:
            groups.setdefault(spec.group, []).append(spec)
    return groups


def flat_buffers(members: Sequence[ParameterSpec], ranks: int, limit: int) -> int:
    """How many buffers stage 3 lays a group's parts into: a buffer is closed once it holds `limit` elements."""
    buffers, filled = 0, 0
    for spec in members:
        buffers += filled == 0
        filled += padded(spec.numel, ranks) // ranks
        if filled >= limit:
            filled = 0
    return buffers


def padded(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple


def padded_rows(spec: ParameterSpec, shards: int) -> int:
    """Elements of a parameter whose first dimension is padded to the number of shards, as fully_shard does."""
    return padded(spec.shape[0], shards) * math.prod(spec.shape[1:])


def add(volume: Volume, kind: Kind, name: str, parallel: ParallelConfig, count: int) -> None:
    """Count bytes under the name that a ledger gives the group; nothing if the group is a single rank."""
    group = group_name(name, sizes_of(parallel))
    if group is not None and count:
        volume[kind, group] += count
