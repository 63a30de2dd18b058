"""Where DeepSpeed keeps what: its flat float32 partitions described as shards of named parameters.

DeepSpeed 0.19. Stages 1 and 2 lay the parameters of an optimizer group end to end and cut the line into one part per
rank, so a rank holds some whole parameters and a piece of one or two. Stage 3 cuts every parameter into one part per
rank, rounded up, and lays a rank's parts end to end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from rae_scale.engines.base import Kind
from rae_scale.engines.optimizer import init_state
from rae_scale.engines.shards import Shard, even_split

MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")


def describe(zero: Any, stage: int, named: Mapping[str, nn.Parameter], group: dist.ProcessGroup) -> list[Shard]:
    """Shards of every parameter, frozen ones included, with AdamW's state created on the partitions.

    zero: `DeepSpeedEngine.optimizer`. named: the module's parameters. group: the ranks that are sharded over.
    """
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    for partition in master_partitions(zero, stage):
        init_state(zero.optimizer, partition)
    names = {parameter: name for name, parameter in named.items()}
    if stage == 3:
        frozen = [frozen_stage3(name, p, rank) for name, p in named.items() if not p.requires_grad]
        return trainable_stage3(zero, names, rank) + frozen
    frozen = [frozen_copy(name, p, rank, count) for name, p in named.items() if not p.requires_grad]
    return trainable_stage12(zero, names) + frozen


def master_partitions(zero: Any, stage: int) -> list[Tensor]:
    """This rank's flat float32 weights, which AdamW updates."""
    return zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups


def gradients_of(zero: Any, stage: int) -> dict[str, list[Tensor]]:
    """This rank's parts of the reduced gradient by optimizer group, as DeepSpeed's `step` will read them."""
    gradients: dict[str, list[Tensor]] = {group["name"]: [] for group in zero.optimizer.param_groups}
    for index, parts in zero.averaged_gradients.items():
        group = zero.sub_group_to_group_id[index] if stage == 3 else index
        gradients[zero.optimizer.param_groups[group]["name"]] += parts
    return gradients


def trainable_stage12(zero: Any, names: Mapping[nn.Parameter, str]) -> list[Shard]:
    shards = []
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
            shards.append(Shard(names[parameter], tuple(parameter.shape), start, stop, group, (start, stop), tensors))
    return shards


def trainable_stage3(zero: Any, names: Mapping[nn.Parameter, str], rank: int) -> list[Shard]:
    shards = []
    for index, parameters in enumerate(zero.fp16_groups):
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[index]]["name"]
        partition = zero.fp32_partitioned_groups_flat[index]
        offset = 0
        for parameter in parameters:
            start, stop = stage3_range(parameter, rank)
            tensors = views(zero, partition, offset, stop - start)
            shards.append(
                Shard(names[parameter], tuple(parameter.ds_shape), start, stop, group, (start, stop), tensors)
            )
            offset += parameter.partition_numel()
    return shards


def views(zero: Any, partition: Tensor, offset: int, numel: int) -> dict[Kind, Tensor]:
    """Weight and moments of `numel` elements of a partition."""
    state = zero.optimizer.state[partition]
    tensors: dict[Kind, Tensor] = {"weight": partition.detach().narrow(0, offset, numel)}
    for kind in MOMENTS:
        tensors[kind] = state[kind].narrow(0, offset, numel)
    return tensors


def frozen_stage3(name: str, parameter: nn.Parameter, rank: int) -> Shard:
    start, stop = stage3_range(parameter, rank)
    weight = parameter.ds_tensor.detach().narrow(0, 0, stop - start)
    return Shard(name, tuple(parameter.ds_shape), start, stop, None, (start, stop), {"weight": weight})


def stage3_range(parameter: nn.Parameter, rank: int) -> tuple[int, int]:
    """The elements of `parameter` on `rank`; none where the parameter has fewer than there are ranks before it."""
    part = parameter.partition_numel()
    return min(rank * part, parameter.ds_numel), min((rank + 1) * part, parameter.ds_numel)


def frozen_copy(name: str, parameter: nn.Parameter, rank: int, count: int) -> Shard:
    """A frozen parameter of which every rank has all; each saves its part."""
    numel = parameter.numel()
    weight = parameter.detach().view(-1)
    owned = even_split(0, numel, rank, count)
    return Shard(name, tuple(parameter.shape), 0, numel, None, owned, {"weight": weight})
