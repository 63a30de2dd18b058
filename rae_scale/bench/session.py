"""The processes of a benchmark: one, or the ranks that a launcher has started."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel import Mesh, build_mesh, init_distributed, shutdown_distributed
from rae_scale.parallel.mesh import choose_device
from rae_scale.parallel.ranks import resolve_ranks

T = TypeVar("T")


class Session:
    """This process among those that measure. Use `open_session`."""

    def __init__(self, device: torch.device, world_size: int) -> None:
        self.device = device
        self.world_size = world_size
        self.rank = dist.get_rank() if world_size > 1 else 0
        self._meshes: dict[ParallelConfig, Mesh] = {}

    @property
    def is_main(self) -> bool:
        """Whether this process reports."""
        return self.rank == 0

    def mesh(self, parallel: ParallelConfig) -> Mesh:
        """The groups of these sizes, made once. Collective the first time.

        Raises:
            ValueError: they are not the sizes of as many processes as there are.
        """
        if parallel.world_size != self.world_size:
            raise ValueError(
                f"parallel.* is the layout of {parallel.world_size} process(es), but {self.world_size} measure; start "
                f"{parallel.world_size} (torchrun --nproc-per-node {parallel.world_size}), or let `rae-scale bench "
                "scaling` start each number by itself"
            )
        if parallel not in self._meshes:
            self._meshes[parallel] = build_mesh(parallel, self.device)
        return self._meshes[parallel]

    def gather(self, value: T) -> list[T]:
        """Every process's `value`, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        gathered: list[T] = [value] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """Of every repeat the slowest process's time: the others wait for it. Collective."""
        return [max(times) for times in zip(*self.gather(list(seconds)), strict=True)]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def open_session(layouts: Iterable[ParallelConfig], device: str = "auto") -> Iterator[Session]:
    """Join the other processes if one of the `layouts` is of several, and leave them at the end.

    Raises:
        ValueError: the launcher started a number of processes that no layout is of, or there is no such device.
    """
    sizes = {parallel.world_size: parallel for parallel in layouts} or {1: ParallelConfig()}
    started = resolve_ranks(os.environ, max(sizes)).world_size
    parallel = sizes.get(started, sizes[max(sizes)])
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, but PyTorch sees no GPU; use --device=cpu")
    if parallel.world_size == 1:
        check_alone()
        yield Session(choose_device(device), 1)
        return
    chosen = init_distributed(parallel, device)
    try:
        yield Session(chosen, parallel.world_size)
    finally:
        shutdown_distributed()


def check_alone() -> None:
    """Several processes that each measure the same by themselves disturb each other, and write to the same files."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ:
        count = os.environ["WORLD_SIZE"]
        raise ValueError(
            f"{count} processes were started (WORLD_SIZE), but parallel.* is the layout of one; say how they work "
            f"together, for example engine.name=fsdp2 parallel.dp_shard={count}, or start one"
        )
