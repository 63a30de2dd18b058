"""Where DeepSpeed keeps what: its flat float32 partitions described as shards of named parameters.

DeepSpeed 0.19. Stages 1 and 2 lay the parameters of an optimizer group end to end and cut the line into one part per
rank, so a rank holds some whole parameters and a piece of one or two. Stage 3 cuts every parameter into one part per
rank, rounded up, and lays a rank's parts end to end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from rae_scale.engines.base import Kind
from rae_scale.engines.optimizer import GroupKey, init_state
from rae_scale.engines.shards import MOMENTS, Shard
from rae_scale.parallel import Mesh
from rae_scale.parallel.boxes import even_split
from rae_scale.parallel.placement import Placement


def describe(
    zero: Any,
    stage: int,
    named: Mapping[str, nn.Parameter],
    group: dist.ProcessGroup,
    placements: Mapping[str, Placement],
    mesh: Mesh,
) -> list[Shard]:
    """Shards of every parameter, frozen ones included, with AdamW's state created on the partitions.

    zero: `DeepSpeedEngine.optimizer`. named: the module's parameters. group: the ranks that are sharded over.
    """
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    for partition in master_partitions(zero, stage):
        init_state(zero.optimizer, partition)
    names = {parameter: name for name, parameter in named.items()}
    frozen = {name: p for name, p in named.items() if not p.requires_grad}
    shards = []
    for found in (
        *(trainable_stage3(zero, names, rank) if stage == 3 else trainable_stage12(zero, names)),
        *(frozen_stage3(n, p, rank) if stage == 3 else frozen_copy(n, p) for n, p in frozen.items()),
    ):
        placement = placements[found.name]
        copy, copies = mesh.copy_of(placement)
        if stage < 3 and found.group is None:  # every rank has all of it
            copy, copies = rank * copies + copy, count * copies
        owned = even_split(found.start, found.stop, copy, copies)
        shards.append(Shard(found.name, placement, found.start, found.stop, found.group, owned, found.tensors))
    return shards


class Found(NamedTuple):
    """Elements `start` to `stop` of this rank's part of a parameter, where DeepSpeed keeps them."""

    name: str
    start: int
    stop: int
    group: str | None
    tensors: dict[Kind, Tensor]


def master_partitions(zero: Any, stage: int) -> list[Tensor]:
    """This rank's flat float32 weights, which AdamW updates."""
    return zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups


def gradients_of(zero: Any, stage: int) -> dict[GroupKey, list[Tensor]]:
    """This rank's parts of the reduced gradient by parameter group, as DeepSpeed's `step` will read them."""
    gradients: dict[GroupKey, list[Tensor]] = {group["key"]: [] for group in zero.optimizer.param_groups}
    if stage == 3 and zero.offload_optimizer:
        for index, partition in enumerate(zero.fp32_partitioned_groups_flat):
            group = zero.optimizer.param_groups[zero.sub_group_to_group_id[index]]
            # A tensor per parameter: the norm of one as long as the model would lose digits.
            sizes = [parameter.partition_numel() for parameter in zero.fp16_groups[index]]
            gradients[group["key"]] += partition.grad.split(sizes)
        return gradients
    for index, parts in zero.averaged_gradients.items():
        group = zero.sub_group_to_group_id[index] if stage == 3 else index
        gradients[zero.optimizer.param_groups[group]["key"]] += parts
    return gradients


def trainable_stage12(zero: Any, names: Mapping[nn.Parameter, str]) -> list[Found]:
    found = []
    for index, parameters in enumerate(zero.bit16_groups):
        group = zero.optimizer.param_groups[index]["name"]
        partition = zero.single_partition_of_fp32_groups[index]
        for parameter in parameters:
            fragment = parameter._hp_mapping
            if fragment is None:
                continue
            start, numel = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
            tensors = views(zero, partition, fragment.hp_fragment_address.start, numel)
            stop = start + numel
            found.append(Found(names[parameter], start, stop, group, tensors))
    return found


def trainable_stage3(zero: Any, names: Mapping[nn.Parameter, str], rank: int) -> list[Found]:
    found = []
    for index, parameters in enumerate(zero.fp16_groups):
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[index]]["name"]
        partition = zero.fp32_partitioned_groups_flat[index]
        offset = 0
        for parameter in parameters:
            start, stop = stage3_range(parameter, rank)
            tensors = views(zero, partition, offset, stop - start)
            found.append(Found(names[parameter], start, stop, group, tensors))
            offset += parameter.partition_numel()
    return found


def views(zero: Any, partition: Tensor, offset: int, numel: int) -> dict[Kind, Tensor]:
    """Weight and moments of `numel` elements of a partition."""
    state = zero.optimizer.state[partition]
    tensors: dict[Kind, Tensor] = {"weight": partition.detach().narrow(0, offset, numel)}
    for kind in MOMENTS:
        tensors[kind] = state[kind].narrow(0, offset, numel)
    return tensors


def frozen_stage3(name: str, parameter: nn.Parameter, rank: int) -> Found:
    start, stop = stage3_range(parameter, rank)
    weight = parameter.ds_tensor.detach().narrow(0, 0, stop - start)
    return Found(name, start, stop, None, {"weight": weight})


def stage3_range(parameter: nn.Parameter, rank: int) -> tuple[int, int]:
    """The elements of `parameter` on `rank`; none where the parameter has fewer than there are ranks before it."""
    part = parameter.partition_numel()
    return min(rank * part, parameter.ds_numel), min((rank + 1) * part, parameter.ds_numel)


def frozen_copy(name: str, parameter: nn.Parameter) -> Found:
    """A frozen parameter of which every rank has all."""
    return Found(name, 0, parameter.numel(), None, {"weight": parameter.detach().view(-1)})
