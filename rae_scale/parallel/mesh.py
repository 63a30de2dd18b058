"""The processes of a run and their groups, made once and handed to whoever communicates.

Axes, slowest to fastest: dp_replicate x dp_shard x sp x tp. Ranks that differ in sp or tp only work on the same
samples. Parameters are sharded over dp_shard x sp and replicated over dp_replicate; gradients and losses are summed
over all three; tp splits single layers and sums nothing by itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rae_scale.config.schema import ParallelConfig

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes, this process's place in them, and the groups it belongs to.

    One process needs no process group: `device_mesh` and `dp_group` are then None and every collective is a no-op.

    device_mesh: dimensions "replicate" (dp_replicate), "shard" (dp_shard x sp) and "tp".
    dp_group:    the ranks that gradients and losses are summed over: dp_replicate x dp_shard x sp.
    """

    device: torch.device
    dp_replicate: int = 1
    dp_shard: int = 1
    sp: int = 1
    tp: int = 1
    rank: int = 0
    device_mesh: DeviceMesh | None = None
    dp_group: dist.ProcessGroup | None = None

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.sp * self.tp

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once: logs, indices, pointers."""
        return self.rank == 0

    @property
    def dp_world(self) -> int:
        """In how many slices the global batch is cut."""
        return self.dp_replicate * self.dp_shard

    @property
    def dp_rank(self) -> int:
        """Which slice of the global batch is this process's: equal for ranks that differ in sp or tp only."""
        return self.rank // (self.sp * self.tp)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over `dp_group`, in place."""
        if self.dp_group is not None:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Every process's `value`, in rank order, on every process."""
        if self.device_mesh is None:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        if self.device_mesh is not None:
            dist.barrier()


def init_distributed(parallel: ParallelConfig, device: str = "auto") -> torch.device:
    """Join the other processes of the run, as torchrun or DeepSpeed's launcher describes them in the environment.

    device: "auto" (CUDA where there is one), "cpu" or "cuda". Returns this process's device. A run of one process
    joins nothing and needs no launcher.

    Raises:
        ValueError: the number of processes is not the product of the sizes in `parallel`, the launcher's variables
            are incomplete, or there is no such device.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != parallel.world_size:
        raise ValueError(
            f"{world_size} process(es) were started (WORLD_SIZE), but parallel.dp_replicate x dp_shard x sp x tp = "
            f"{parallel.dp_replicate} x {parallel.dp_shard} x {parallel.sp} x {parallel.tp} = {parallel.world_size}; "
            f"start {parallel.world_size} (torchrun --nproc-per-node {parallel.world_size} on one machine) or choose "
            f"sizes whose product is {world_size}, for example parallel.dp_shard={world_size}"
        )
    torch_device = choose_device(device)
    if world_size == 1:
        return torch_device
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={world_size} but {', '.join(missing)} is not set; start the processes with torchrun or "
            "deepspeed"
        )
    if torch_device.type == "cuda":
        # Both backends: checkpoints and error reports exchange Python objects, which need no GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch_device)
    else:
        dist.init_process_group("gloo")
    return torch_device


def choose_device(device: str) -> torch.device:
    """This process's device, made the current one if it is a GPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    available = torch.cuda.device_count()
    if local_rank >= available:
        raise ValueError(
            f"run.device={device}: process {local_rank} of this machine has no GPU of its own, {available} are "
            "visible; start one process per GPU, or set run.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def build_mesh(parallel: ParallelConfig, device: torch.device) -> Mesh:
    """The groups for the sizes in `parallel`. Collective: every process calls it, once, after `init_distributed`."""
    sizes = {"dp_replicate": parallel.dp_replicate, "dp_shard": parallel.dp_shard, "sp": parallel.sp, "tp": parallel.tp}
    if parallel.world_size == 1:
        return Mesh(device, **sizes)
    shape = (parallel.dp_replicate, parallel.dp_shard * parallel.sp, parallel.tp)
    device_mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard", "tp"))
    dp_group = dist.group.WORLD
    if parallel.tp > 1:
        ranks = [list(range(first, parallel.world_size, parallel.tp)) for first in range(parallel.tp)]
        dp_group, _ = dist.new_subgroups_by_enumeration(ranks)
    return Mesh(device, **sizes, rank=dist.get_rank(), device_mesh=device_mesh, dp_group=dp_group)


def one_process_group(device: torch.device) -> bool:
    """Make a process group of one if there is none, and say whether it was made.

    DeepSpeed and FSDP2 know no other way to run; nothing listens on a port for it.
    """
    if dist.is_initialized():
        return False
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return True


def shutdown_distributed() -> None:
    """Leave the other processes. Nothing may communicate afterwards."""
    if dist.is_initialized():
        dist.destroy_process_group()
