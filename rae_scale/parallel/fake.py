"""Ranks that do not exist: torch's fake process group stands in for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel.mesh import Mesh


@contextlib.contextmanager
def fake_ranks(parallel: ParallelConfig, rank: int) -> Iterator[Mesh]:
    """This process as `rank` of a run whose other processes do not exist: collectives do nothing and return at once."""
    # Importing it registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "this process is a rank of a real run"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
    try:
        sizes = parallel.dp_replicate, parallel.dp_shard, parallel.sp, parallel.tp
        # `parallel.build_mesh` also makes a gloo group for checkpoints, which would wait for the other processes.
        shape = (parallel.dp_replicate, parallel.dp_shard * parallel.sp, parallel.tp)
        device_mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp"))
        mesh = Mesh(torch.device("cpu"), *sizes, rank=rank, device_mesh=device_mesh)
        first = rank - mesh.sp_rank * parallel.tp
        yield replace(
            mesh,
            sp_group=dist.new_group([first + i * parallel.tp for i in range(parallel.sp)]) if parallel.sp > 1 else None,
            tp_group=device_mesh["tp"].get_group() if parallel.tp > 1 else None,
        )
    finally:
        dist.destroy_process_group()
