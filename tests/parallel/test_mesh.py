from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel import Mesh, build_mesh, init_distributed, shutdown_distributed
from rae_scale.parallel.mesh import choose_device, one_process_group

CPU = torch.device("cpu")
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    others = [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "MV2_", "JOB_COMPLETION_"))]
    for name in (*own, *others):
        # Set first: monkeypatch then also removes what init_distributed writes.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_one_process_needs_no_launcher_and_no_group() -> None:
    assert init_distributed(ParallelConfig(), "cpu") == CPU
    mesh = build_mesh(ParallelConfig(), CPU)
    assert not dist.is_initialized()
    assert (mesh.world_size, mesh.dp_world, mesh.dp_rank, mesh.is_main) == (1, 1, 0, True)
    assert mesh.device == CPU
    assert float(mesh.all_reduce(torch.tensor(3.0))) == 3
    assert mesh.gather_objects("one") == ["one"]
    mesh.barrier()


def test_wrong_number_of_processes_names_both_numbers_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"^2 process.*\(WORLD_SIZE\).* = 4;.*nproc-per-node 4.*parallel.dp_shard=2"):
        init_distributed(ParallelConfig(dp_replicate=2, dp_shard=2), "cpu")


def test_sizes_without_processes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^1 process.*no launcher.* = 2;"):
        init_distributed(ParallelConfig(dp_shard=2), "cpu")


def test_the_number_of_processes_is_named_as_its_launcher_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"^2 process.*\(OMPI_COMM_WORLD_SIZE\).* = 4;"):
        init_distributed(ParallelConfig(dp_shard=4), "cpu")


def test_one_process_in_a_larger_launch_runs_by_itself_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    assert init_distributed(ParallelConfig(), "cpu") == CPU
    assert not dist.is_initialized()
    assert "OMPI_COMM_WORLD_SIZE=2 is ignored" in caplog.text
    assert "WORLD_SIZE" not in os.environ


def test_one_process_under_torchrun_joins_nothing_and_says_who_started_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rae_scale")
    for name, value in {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert init_distributed(ParallelConfig(), "cpu") == CPU
    assert not dist.is_initialized()
    assert caplog.messages == [
        "rank 0 of 1 (WORLD_SIZE), local rank 0, rank 0 at 127.0.0.1:29500, according to torchrun"
    ]


def test_incomplete_launcher_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        init_distributed(ParallelConfig(dp_shard=2), "cpu")


def test_a_process_without_a_gpu_of_its_own_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU of its own, 2 are visible"):
        choose_device("auto")
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("rank", range(16))
def test_ranks_that_share_samples_share_their_slice(rank: int) -> None:
    mesh = Mesh(CPU, dp_replicate=2, dp_shard=2, sp=2, tp=2, rank=rank)
    assert mesh.world_size == 16
    assert mesh.dp_world == 4
    assert mesh.dp_rank == rank // 4
    assert mesh.is_main == (rank == 0)


def test_a_group_of_one_is_made_once_and_left() -> None:
    assert one_process_group(CPU)
    assert not one_process_group(CPU)
    assert dist.get_world_size() == 1
    shutdown_distributed()
    assert not dist.is_initialized()
    shutdown_distributed()
