"""The processes of a run and their groups, made once and handed to whoever communicates.

Axes, slowest to fastest: dp_replicate x dp_shard x sp x tp. Ranks that differ in sp or tp only work on the same
samples. Parameters are sharded over dp_shard x sp and replicated over dp_replicate; gradients and losses are summed
over all three; tp splits single layers and sums nothing by itself.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rae_scale.config.schema import FaultConfig, ParallelConfig
from rae_scale.parallel.placement import Placement
from rae_scale.parallel.process import settle
from rae_scale.parallel.ranks import resolve_ranks
from rae_scale.parallel.variables import integer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes, this process's place in them, and the groups it belongs to.

    One process needs no process group: `device_mesh` and every group are then None and every collective is a no-op.
    The groups of an axis of size 1 are None too.

    device_mesh:  dimensions "replicate" (dp_replicate), "shard" (dp_shard x sp) and "tp".
    dp_group:     the ranks that gradients and losses are summed over: dp_replicate x dp_shard x sp.
    sp_group:     the ranks that hold the token slices of the same samples, in the order of the slices.
    tp_group:     the ranks that hold the parts of the same layers, in the order of the parts.
    sample_group: sp x tp, the ranks that work on the same samples.
    norm_group:   dp_shard x sp x tp, the ranks that together hold the model once.
    save_group:   all ranks once more, for the thread that writes checkpoints while training communicates.
    object_group: what `gather_objects` and `barrier` go through; None is the default group of all ranks.
    """

    device: torch.device
    dp_replicate: int = 1
    dp_shard: int = 1
    sp: int = 1
    tp: int = 1
    rank: int = 0
    device_mesh: DeviceMesh | None = None
    dp_group: dist.ProcessGroup | None = None
    sp_group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None
    sample_group: dist.ProcessGroup | None = None
    norm_group: dist.ProcessGroup | None = None
    save_group: dist.ProcessGroup | None = None
    object_group: dist.ProcessGroup | None = None

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

    @property
    def sp_rank(self) -> int:
        """Which slice of the tokens is this process's."""
        return self.rank // self.tp % self.sp

    @property
    def tp_rank(self) -> int:
        """Which part of each split layer is this process's."""
        return self.rank % self.tp

    @property
    def sample_rank(self) -> int:
        """This process's place among the `sp * tp` that work on the same samples."""
        return self.rank % (self.sp * self.tp)

    def copy_of(self, placement: Placement) -> tuple[int, int]:
        """Which copy of a parameter's shards this process holds, of how many: replicas, and tensor-parallel ranks if
        the parameter is not split over them."""
        replica = self.rank // (self.dp_shard * self.sp * self.tp)
        if placement.is_split:
            return replica, self.dp_replicate
        return replica * self.tp + self.tp_rank, self.dp_replicate * self.tp

    def tp_if_whole(self, placement: Placement) -> tuple[str, ...]:
        """("tp",) if every tensor-parallel rank holds the whole of a parameter, else ()."""
        return ("tp",) if self.tp > 1 and not placement.is_split else ()

    def copies_group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ along "dp_replicate", "dp" (all of `dp_group`) or "tp" only."""
        groups = {"dp": self.dp_group, "tp": self.tp_group}
        group = self.device_mesh["replicate"].get_group() if axis == "dp_replicate" else groups[axis]  # type: ignore[index]
        assert group is not None, f"there is one rank along {axis}: nothing to compare"
        return group

    def from_main(self, value: float) -> float:
        """The main rank's `value` on every rank."""
        if self.device_mesh is None:
            return value
        carrier = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(carrier, src=0)
        return float(carrier)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over `dp_group`, in place."""
        if self.dp_group is not None:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def any(self, flags: Tensor) -> list[bool]:
        """For each of the bool `flags` [N] whether it is set on any process of the run. The same on all of them."""
        counts = flags.float()
        if self.device_mesh is not None:
            dist.all_reduce(counts)
        return [count > 0 for count in counts.tolist()]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every process's `value`, in rank order, on every process."""
        if self.device_mesh is None:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.object_group)
        return gathered

    def barrier(self) -> None:
        if self.device_mesh is not None:
            dist.barrier(group=self.object_group)

    def for_saving(self) -> Mesh:
        """This mesh with `gather_objects` and `barrier` of their own, for a second thread: calls of one group must come
        in the same order on all ranks, which two threads cannot promise each other."""
        assert self.device_mesh is None or self.save_group is not None, "build_mesh makes the group"
        return replace(self, object_group=self.save_group)


def init_distributed(
    parallel: ParallelConfig, device: str = "auto", *, timeout_s: float | None = None, store: dist.Store | None = None
) -> torch.device:
    """Join the other processes of the run, as whatever started them describes them in the environment.

    `rae_scale.parallel.ranks` says which launchers are understood; what they say is written back as torchrun's
    variables, which PyTorch and DeepSpeed read. device: "auto" (CUDA where there is one), "cpu" or "cuda". Returns this
    process's device. A run of one process joins nothing and needs no launcher.

    timeout_s: how long a collective may take; None is PyTorch's default. store: through which the ranks find each
        other; None opens the one that MASTER_ADDR and MASTER_PORT tell.

    Raises:
        ValueError: the number of processes is not the product of the sizes in `parallel`, the launcher's variables
            are incomplete or contradict each other, or there is no such device.
    """
    ranks = resolve_ranks(os.environ, parallel.world_size)
    if ranks.world_size != parallel.world_size:
        raise ValueError(
            f"{ranks.world_size} process(es) were started ({ranks.origin}), but parallel.dp_replicate x dp_shard x sp "
            f"x tp = {parallel.dp_replicate} x {parallel.dp_shard} x {parallel.sp} x {parallel.tp} = "
            f"{parallel.world_size}; start {parallel.world_size} (torchrun --nproc-per-node {parallel.world_size} on "
            f"one machine) or choose sizes whose product is {ranks.world_size}, for example "
            f"parallel.dp_shard={ranks.world_size}"
        )
    if ranks.launched:
        os.environ.update(ranks.variables())
        settle(ranks.local_rank)
        logger.info("%s", ranks)
    if ranks.ignored:
        logger.warning(
            "%s is ignored: parallel.* asks for one process, so this one runs by itself, and so do the others if they "
            "have the same configuration",
            ranks.ignored,
        )
    torch_device = choose_device(device)
    if ranks.world_size == 1:
        return torch_device
    if torch_device.type == "cuda":
        # Both backends: checkpoints and error reports exchange Python objects, which need no GPU.
        backend: dict[str, Any] = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch_device}
    else:
        backend = {"backend": "gloo"}
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    # A store says nothing of ranks, unlike the variables that are read without one.
    place = {} if store is None else {"store": store, "rank": ranks.rank, "world_size": ranks.world_size}
    dist.init_process_group(**backend, timeout=timeout, **place)
    return torch_device


def choose_device(device: str) -> torch.device:
    """This process's device, made the current one if it is a GPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank = integer(os.environ, "LOCAL_RANK", default=0)
    available = torch.cuda.device_count()
    if local_rank >= available:
        raise ValueError(
            f"run.device={device}: process {local_rank} of this machine has no GPU of its own, {available} are "
            "visible; start one process per GPU (srun: with --gpu-bind=none, so that each sees all of them), or set "
            "run.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def build_mesh(parallel: ParallelConfig, device: torch.device, fault: FaultConfig | None = None) -> Mesh:
    """The groups for the sizes in `parallel`. Collective: every process calls it, once, after `init_distributed`.

    fault: how long collectives may take; None leaves PyTorch's defaults.
    """
    sizes = {"dp_replicate": parallel.dp_replicate, "dp_shard": parallel.dp_shard, "sp": parallel.sp, "tp": parallel.tp}
    if parallel.world_size == 1:
        return Mesh(device, **sizes)
    shape = (parallel.dp_replicate, parallel.dp_shard * parallel.sp, parallel.tp)
    device_mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard", "tp"))
    # Axes as dimensions: a group is made of the ranks that differ in some of them only.
    ranks = torch.arange(parallel.world_size).view(parallel.dp_replicate, parallel.dp_shard, parallel.sp, parallel.tp)
    mesh = Mesh(
        device,
        **sizes,
        rank=dist.get_rank(),
        device_mesh=device_mesh,
        dp_group=group_over(ranks.permute(3, 0, 1, 2).flatten(1)),
        sp_group=group_over(ranks.permute(0, 1, 3, 2).flatten(0, 2)) if parallel.sp > 1 else None,
        tp_group=device_mesh["tp"].get_group() if parallel.tp > 1 else None,
        sample_group=group_over(ranks.flatten(2).flatten(0, 1)) if parallel.sp * parallel.tp > 1 else None,
        norm_group=group_over(ranks.flatten(1)),
        save_group=dist.new_group(backend="gloo"),
    )
    if fault is not None:
        set_timeouts(mesh, fault)
    return mesh


def set_timeouts(mesh: Mesh, fault: FaultConfig) -> None:
    """Groups that were made without one have PyTorch's, whatever the default group has: 10 minutes for NCCL."""
    # Before torch 2.15 the same function had the private name only.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    assert mesh.device_mesh is not None and mesh.save_group is not None
    groups = [*mesh.device_mesh.get_all_groups(), mesh.dp_group, mesh.sp_group, mesh.sample_group, mesh.norm_group]
    for group in {group for group in groups if group is not None}:
        set_timeout(timedelta(seconds=fault.collective_timeout_s), group)
    set_timeout(timedelta(seconds=fault.save_collective_timeout_s), mesh.save_group)


def group_over(ranks: Tensor) -> dist.ProcessGroup:
    """The one of the groups in `ranks` [groups, size] that this process belongs to. All processes are in one."""
    if len(ranks) == 1:
        return dist.group.WORLD
    group, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
    return group


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
