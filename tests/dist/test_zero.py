"""DeepSpeed's three stages on gloo ranks, and one run handed from engine to engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checks import (
    assert_close_to,
    build,
    build_eager,
    check_activation_checkpointing,
    check_bf16,
    check_curve,
    check_interruptions,
    run,
    snapshot,
)
from harness import run_ranks
from toy_model import engine_config, micro_batches, train_step

from rae_scale.config.schema import ParallelConfig
from rae_scale.engines import zero
from rae_scale.parallel import Mesh, build_mesh, init_distributed, shutdown_distributed
from rae_scale.state import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.dist


def partition_small_parameters() -> None:
    """Let stage 3 part with every parameter of more than 64 elements. With DeepSpeed's own threshold all of a toy's
    stay whole on every rank, and nothing would ever be gathered."""
    plain = zero.deepspeed_config

    def deepspeed_config(*args: Any) -> dict[str, Any]:
        config = plain(*args)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 64
        return config

    zero.deepspeed_config = deepspeed_config


def two_ranks(folder: str) -> None:
    partition_small_parameters()
    parallel = ParallelConfig(dp_shard=2)
    mesh = build_mesh(parallel, init_distributed(parallel, "cpu"))
    for stage in (1, 2, 3):
        cfg = engine_config("zero", stage)
        check_curve(cfg, mesh)
        check_curve(cfg, mesh, steps=4, freeze_llm=True)
        check_interruptions(cfg, mesh, Path(folder) / str(stage))
        check_bf16(engine_config("zero", stage, precision="bf16"), mesh)
    check_activation_checkpointing(engine_config("zero", 3), mesh)
    offloaded = engine_config("zero", 3).model_copy(update={"offload_optimizer": True})
    check_curve(offloaded, mesh)
    check_interruptions(offloaded, mesh, Path(folder) / "offloaded")
    check_no_stale_gradients(mesh)
    check_handover(mesh, Path(folder))
    shutdown_distributed()


def check_no_stale_gradients(mesh: Mesh) -> None:
    """A parameter that gets no gradient in a step is not moved by the step before it: its first moment only decays."""
    engine = build(engine_config("zero", 3), mesh)
    train_step(engine, 0, mesh.dp_rank, mesh.dp_world, 1)
    before = snapshot(engine)
    batch = next(micro_batches(1, mesh.dp_rank, mesh.dp_world, 1))
    engine.backward(engine.module(ids=batch.ids, features=batch.features, x=batch.x).text_loss_sum, last=True)
    engine.step({"llm": 0.01, "dit": 0.01})
    for (kind, name, corner), moment in snapshot(engine).items():
        if kind == "exp_avg" and name.startswith("dit."):
            torch.testing.assert_close(moment, 0.8 * before[kind, name, corner])
    engine.close()


def check_handover(mesh: Mesh, folder: Path) -> None:
    """zero3 on two ranks -> fsdp2 on two -> eager on one -> zero1 on two: the curve of one uninterrupted process."""
    straight = build_eager()
    run(straight, Mesh(mesh.device), range(8))

    alone = Mesh(mesh.device)
    stations = [
        (engine_config("zero", 3), mesh, folder / "zero3"),
        (engine_config("fsdp2"), mesh, folder / "fsdp2"),
        (engine_config("eager"), alone, folder / f"eager-{mesh.rank}"),
        (engine_config("zero", 1), mesh, folder / "zero1"),
    ]
    path: Path | None = None
    for number, (cfg, where, run_dir) in enumerate(stations):
        engine = build(cfg, where)
        if path is not None:
            load_checkpoint(path, engine, where)
        run(engine, where, range(2 * number, 2 * number + 2))
        path = save_checkpoint(run_dir, 2 * number + 2, engine, where, {}, keep_last=1)
        if where is alone:
            mesh.barrier()
            path = folder / "eager-0" / "checkpoints" / path.name
        if number == len(stations) - 1:
            assert engine.optimizer_step == 8
            assert_close_to(engine, straight, "handed from engine to engine")
        engine.close()


def test_zero_on_two_ranks(tmp_path: Path) -> None:
    leftovers = set(Path("/dev/shm").glob("deepspeed_*"))
    run_ranks(two_ranks, 2, tmp_path, args=(str(tmp_path / "run"),))
    assert set(Path("/dev/shm").glob("deepspeed_*")) == leftovers
    for rank in range(2):
        log = (tmp_path / f"rank-{rank}.log").read_text()
        assert "[INFO]" not in log and "torch.autocast" not in log, log
