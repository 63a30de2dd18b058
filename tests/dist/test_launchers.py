"""Processes that something else than torchrun has started find each other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel import build_mesh, init_distributed, shutdown_distributed

pytestmark = pytest.mark.dist

OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}


def join_as_open_mpi_starts_them() -> tuple[float, str]:
    told = {own: os.environ.pop(name) for name, own in OPEN_MPI.items()}
    os.environ.update(told)
    parallel = ParallelConfig(dp_shard=2)
    mesh = build_mesh(parallel, init_distributed(parallel, "cpu"))
    total = float(mesh.all_reduce(torch.tensor(1.0 + mesh.rank)))
    assert dist.get_rank() == int(told["OMPI_COMM_WORLD_RANK"])
    # PyTorch and DeepSpeed read these.
    assert {name: os.environ[name] for name in OPEN_MPI} == {name: told[own] for name, own in OPEN_MPI.items()}
    shutdown_distributed()
    return total, os.environ["RANK"]


def test_processes_of_mpirun_join(tmp_path: Path) -> None:
    assert run_ranks(join_as_open_mpi_starts_them, 2, tmp_path, timeout=120) == [(3.0, "0"), (3.0, "1")]
