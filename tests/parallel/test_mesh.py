from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel import Mesh, build_mesh, init_distributed, shutdown_distributed
from rae_scale.parallel.mesh import choose_device, one_process_group

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


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
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^2 process.* = 4;.*nproc-per-node 4.*parallel.dp_shard=2"):
        init_distributed(ParallelConfig(dp_replicate=2, dp_shard=2), "cpu")


def test_sizes_without_processes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^1 process.* = 2;"):
        init_distributed(ParallelConfig(dp_shard=2), "cpu")


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
