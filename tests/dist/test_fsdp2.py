"""FSDP2 on gloo ranks. Every check runs in the one set of processes that a test starts: starting them is what costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checks import (
    build,
    build_eager,
    check_activation_checkpointing,
    check_bf16,
    check_curve,
    check_interruptions,
    run,
)
from harness import run_ranks
from toy_model import engine_config

from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel import Mesh, build_mesh, init_distributed, shutdown_distributed
from rae_scale.state import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.dist


def two_ranks(folder: str) -> None:
    parallel = ParallelConfig(dp_shard=2)
    mesh = build_mesh(parallel, init_distributed(parallel, "cpu"))
    fsdp2 = engine_config("fsdp2")
    check_curve(fsdp2, mesh)
    check_curve(fsdp2, mesh, steps=4, freeze_llm=True)
    check_interruptions(fsdp2, mesh, Path(folder))
    offloaded = fsdp2.model_copy(update={"offload_optimizer": True})
    check_curve(offloaded, mesh)
    check_interruptions(offloaded, mesh, Path(folder) / "offloaded")
    check_activation_checkpointing(fsdp2, mesh)
    check_bf16(engine_config("fsdp2", precision="bf16"), mesh)
    shutdown_distributed()


def test_fsdp2_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, tmp_path, args=(str(tmp_path / "run"),))


def four_ranks(folder: str) -> None:
    parallel = ParallelConfig(dp_replicate=2, dp_shard=2)
    device = init_distributed(parallel, "cpu")
    mesh = build_mesh(parallel, device)
    check_curve(engine_config("fsdp2"), mesh, steps=4)
    check_replicas_save_once(mesh, Path(folder))
    check_group_with_tensor_axis(device)
    shutdown_distributed()


def check_replicas_save_once(mesh: Mesh, folder: Path) -> None:
    """Copies share the saving: `save_checkpoint` refuses what does not cover each element exactly once."""
    engine = build(engine_config("fsdp2"), mesh)
    run(engine, mesh, range(2), count=1)
    path = save_checkpoint(folder, 2, engine, mesh, {}, keep_last=1)
    run(engine, mesh, range(2, 4), count=1)
    sizes = mesh.gather_objects(sum(piece.tensor.numel() for piece in engine.pieces()))
    assert max(sizes) < 1.5 * min(sizes), sizes
    resumed = build_eager()
    load_checkpoint(path, resumed, Mesh(mesh.device))
    run(resumed, Mesh(mesh.device), range(2, 4))
    whole = {(p.kind, p.name): p.tensor for p in resumed.pieces()}
    for piece in engine.pieces():
        torch.testing.assert_close(piece.tensor, whole[piece.kind, piece.name][piece.box.slices], rtol=1e-5, atol=1e-6)


def check_group_with_tensor_axis(device: torch.device) -> None:
    """Ranks 0..3 of dp_shard 2 x tp 2: samples go by pairs, sums by every other rank."""
    mesh = build_mesh(ParallelConfig(dp_shard=2, tp=2), device)
    assert mesh.dp_rank == mesh.rank // 2
    assert mesh.dp_world == 2
    total = mesh.all_reduce(torch.tensor(10.0**mesh.rank))
    assert float(total) == (101.0, 1010.0)[mesh.rank % 2]


def test_fsdp2_with_replicas_on_four_ranks(tmp_path: Path) -> None:
    run_ranks(four_ranks, 4, tmp_path, args=(str(tmp_path / "run"),))
