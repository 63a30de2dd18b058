"""What each rank holds of a model's weights, gradients and optimizer state: arithmetic, without processes.

Letters: n the ranks that parameters are sharded over (dp_shard x sp), r the replicas (dp_replicate), tp the
tensor-parallel ranks. Arrays over ranks are int64 [tp, n]: replicas hold the same.

Not counted: activations, buffers of collectives, what is gathered while a block computes, and the small parameters that
DeepSpeed's stage 3 keeps gathered.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rae_scale.config import Config
from rae_scale.engines.optimizer import GroupKey
from rae_scale.parallel.placement import Placement

FLOAT32 = 4  # bytes
BFLOAT16 = 2
MOMENTS = 2  # of AdamW, per parameter
ZERO_ALIGNMENT = 2  # elements: DeepSpeed rounds the line of stages 1 and 2 up to this per rank


@dataclass(frozen=True)
class HeldParameter:
    """A parameter after `parallelize`.

    part:  of the model, for the report.
    group: optimizer group, None if frozen.
    """

    name: str
    part: str
    group: GroupKey | None
    placement: Placement

    def local_shape(self, tp_rank: int) -> tuple[int, ...]:
        return replace(self.placement, index=tp_rank).local_shape


@dataclass
class PartSizes:
    """What the ranks hold of one part of the model.

    held:      elements of parameters, each rank's share of them without padding.
    weights:   bytes, with padding, and with float32 masters beside what is computed with, where the engine has both.
    gradients: bytes after a backward pass. Accumulation over micro-steps may need whole ones.
    optimizer: bytes of AdamW's two moments.
    ema:       bytes of the moving average.
    elements:  number of ranks that hold the same share -> elements of the logical tensors of which that is so.
    """

    held: Tensor
    weights: Tensor
    gradients: Tensor
    optimizer: Tensor
    ema: Tensor
    elements: Counter[int] = field(default_factory=Counter)

    @classmethod
    def empty(cls, tp: int, n: int) -> PartSizes:
        return cls(*(torch.zeros(tp, n, dtype=torch.int64) for _ in range(5)))

    @property
    def total(self) -> Tensor:
        return self.weights + self.gradients + self.optimizer + self.ema

    def __add__(self, other: PartSizes) -> PartSizes:
        return PartSizes(
            self.held + other.held,
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.ema + other.ema,
            self.elements + other.elements,
        )


def sizes_by_part(config: Config, parameters: Sequence[HeldParameter]) -> dict[str, PartSizes]:
    """Sizes on every rank of `config.parallel`, by part of the model in the order of `parameters`."""
    parallel, engine = config.parallel, config.engine
    n = parallel.dp_shard * parallel.sp
    sizes = {p.part: PartSizes.empty(parallel.tp, n) for p in parameters}
    has_ema = config.optim.ema_decay is not None
    moment_bytes = BFLOAT16 if config.optim.moments == "bf16" else FLOAT32
    for tp_rank in range(parallel.tp):
        shapes = {p.name: p.local_shape(tp_rank) for p in parameters}
        for p, shared in zip(parameters, shares(config, parameters, shapes), strict=True):
            part, local = sizes[p.part], math.prod(shapes[p.name])
            part.held[tp_rank] += shared.held
            part.weights[tp_rank] += weight_bytes(config, p, shared, local)
            if p.group is None:
                continue
            part.gradients[tp_rank] += FLOAT32 * (local if keeps_whole_gradients(config) else shared.stored)
            # DeepSpeed's moments belong to its padded partitions, ours to the parameters.
            of_moments = shared.stored if engine.name == "zero" else shared.held
            part.optimizer[tp_rank] += moment_bytes * MOMENTS * of_moments
            part.ema[tp_rank] += FLOAT32 * shared.held * has_ema
    for p in parameters:
        # Replicas and, for what is not split, tensor-parallel ranks hold copies; stages 1 and 2 copy what is frozen.
        copies = parallel.dp_replicate * (1 if p.placement.is_split else parallel.tp)
        if p.group is None and keeps_whole_weights(config):
            copies *= n
        sizes[p.part].elements[copies] += math.prod(p.placement.shape)
    return sizes


@dataclass(frozen=True)
class Shares:
    """Of one parameter's local tensor, int64 [n]: elements that each rank holds, without and with padding."""

    held: Tensor
    stored: Tensor


def shares(config: Config, parameters: Sequence[HeldParameter], shapes: Mapping[str, tuple[int, ...]]) -> list[Shares]:
    """Each parameter's shares under the configured engine. `shapes`: of their local tensors."""
    n = config.parallel.dp_shard * config.parallel.sp
    if config.engine.name != "zero":
        return [rows_of(shapes[p.name], n) for p in parameters]
    if config.engine.zero_stage == 3:
        return [rounded(math.prod(shapes[p.name]), n) for p in parameters]
    groups: dict[GroupKey | None, list[str]] = defaultdict(list)
    for p in parameters:
        groups[p.group].append(p.name)
    found: dict[str, Shares] = {}
    for group, names in groups.items():
        counts = [math.prod(shapes[name]) for name in names]
        if group is None:
            found |= {name: copied(count, n) for name, count in zip(names, counts, strict=True)}
        else:
            found |= zip(names, line(counts, n), strict=True)
    return [found[p.name] for p in parameters]


def rows_of(shape: tuple[int, ...], n: int) -> Shares:
    """fully_shard: rows in equal parts, rounded up; the last ranks have fewer or none, in memory for as many."""
    rows, row = shape[0], math.prod(shape[1:])
    each = -(-rows // n)
    edges = (torch.arange(n + 1) * each).clamp(max=rows)
    return Shares(edges.diff() * row, torch.full((n,), each * row))


def rounded(count: int, n: int) -> Shares:
    """ZeRO stage 3: elements in equal parts, rounded up, the last ones padded."""
    each = -(-count // n)
    edges = (torch.arange(n + 1) * each).clamp(max=count)
    return Shares(edges.diff(), torch.full((n,), each))


def copied(count: int, n: int) -> Shares:
    every = torch.full((n,), count)
    return Shares(every, every)


def line(counts: Sequence[int], n: int) -> list[Shares]:
    """ZeRO stages 1 and 2: a group's parameters end to end, cut into equal parts; what pads the end counts as its last
    parameter's."""
    align = ZERO_ALIGNMENT * n
    total = -(-sum(counts) // align) * align
    edges = torch.arange(n + 1) * (total // n)
    found, start = [], 0
    for position, count in enumerate(counts):
        stop = start + count
        held = edges.clamp(start, stop).diff()
        last = position == len(counts) - 1
        found.append(Shares(held, edges.clamp(start, total).diff() if last else held))
        start = stop
    return found


def weight_bytes(config: Config, p: HeldParameter, shared: Shares, local: int) -> Tensor:
    """Bytes [n] of a parameter of `local` elements on a tensor-parallel rank, masters included."""
    if config.engine.name != "zero":
        return FLOAT32 * shared.stored
    computed = FLOAT32 * torch.full_like(shared.stored, local)
    if config.engine.zero_stage == 3:
        computed = (BFLOAT16 if config.engine.precision == "bf16" else FLOAT32) * shared.stored
    return computed if p.group is None else computed + FLOAT32 * shared.stored


def keeps_whole_weights(config: Config) -> bool:
    return config.engine.name == "zero" and config.engine.zero_stage < 3


def keeps_whole_gradients(config: Config) -> bool:
    """Whether gradients stay whole on each rank (float32) until they are reduced, once per step."""
    if config.engine.name == "zero":
        return config.engine.zero_stage == 1
    data, parallel = config.data, config.parallel
    local = data.global_batch_size // (parallel.dp_replicate * parallel.dp_shard)
    return data.micro_batch_size is not None and data.micro_batch_size < local


def total_of(sizes: Iterable[PartSizes]) -> PartSizes:
    first, *rest = sizes
    for part in rest:
        first = first + part
    return first


def check_sum(total: PartSizes, logical: int, dp_replicate: int) -> None:
    """What all ranks hold is the whole model, copies counted as often as there are."""
    assert sum(total.elements.values()) == logical, (total.elements, logical)
    held = int(total.held.sum()) * dp_replicate
    wanted = sum(copies * elements for copies, elements in total.elements.items())
    assert held == wanted, f"ranks hold {held} elements, {wanted} expected"
