"""The mesh as DeepSpeed wants to see it."""

from __future__ import annotations

import torch.distributed as dist

from rae_scale.parallel.mesh import Mesh


class MpuView:
    """Megatron's "mpu" interface: ZeRO shards over the data-parallel group that it is told here.

    Sequence parallelism is part of that group and has no methods of its own: with a sequence-parallel group beside it,
    DeepSpeed partitions over the one and scales by the other, and gradients come out wrong without an error.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.data_group = mesh.dp_group or dist.group.WORLD
        self.model_group = dist.group.WORLD if mesh.device_mesh is None else mesh.device_mesh["tp"].get_group()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_group

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data_group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data_group)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model_group

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.model_group)

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.model_group)

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
