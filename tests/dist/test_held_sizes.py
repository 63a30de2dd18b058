"""`train.layout_sizes` says what real engines hold, byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from awkward import scale_rae
from harness import run_ranks

from rae_scale.config import Config, parse_config
from rae_scale.config.schema import ParallelConfig
from rae_scale.engines import build_engine
from rae_scale.engines.zero_layout import master_partitions
from rae_scale.models.composite import group_of
from rae_scale.parallel import Mesh, build_mesh, init_distributed, shutdown_distributed
from rae_scale.parallel.placement import Placement
from rae_scale.train.layout import held_parameters
from rae_scale.train.layout_sizes import MOMENTS, HeldParameter, shares, sizes_by_part, total_of

pytestmark = pytest.mark.dist

KINDS = ("exp_avg", "exp_avg_sq")
RANKS = 3  # divides hardly anything
ENGINES: list[dict[str, Any]] = [
    {"name": "fsdp2"},
    {"name": "zero", "zero_stage": 1, "precision": "fp32"},
    {"name": "zero", "zero_stage": 2},
    {"name": "zero", "zero_stage": 3},
    {"name": "zero", "zero_stage": 3, "precision": "fp32"},
]


def three_ranks() -> None:
    parallel = ParallelConfig(dp_shard=RANKS)
    mesh = build_mesh(parallel, init_distributed(parallel, "cpu"))
    for engine, optim in [*((engine, {}) for engine in ENGINES), (ENGINES[0], {"moments": "bf16"})]:
        check_engine(
            parse_config(
                {
                    "engine": engine,
                    "parallel": {"dp_shard": RANKS},
                    "data": {"global_batch_size": RANKS},
                    "optim": {"ema_decay": 0.9, **optim},
                }
            ),
            mesh,
        )
    shutdown_distributed()


def check_engine(config: Config, mesh: Mesh) -> None:
    module = scale_rae()
    module.conditioner.llm.requires_grad_(False)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    placements = {name: Placement(shape) for name, shape in shapes.items()}
    parameters = held_parameters(config, module, group_of, placements)
    assert {p.group is None for p in parameters} == {True, False}
    engine: Any = build_engine(config.engine, config.optim, module, group_of, mesh)
    compare(config, engine, parameters, shapes, mesh.rank)
    engine.close()


def compare(
    config: Config, engine: Any, parameters: list[HeldParameter], shapes: dict[str, tuple[int, ...]], rank: int
) -> None:
    expected = {p.name: int(s.held[rank]) for p, s in zip(parameters, shares(config, parameters, shapes), strict=True)}
    found = dict.fromkeys(expected, 0)
    for shard in engine.shards:
        found[shard.name] += shard.stop - shard.start
    assert found == expected, config.engine
    sizes = total_of(sizes_by_part(config, parameters).values())
    held = {name: int(getattr(sizes, name)[0, rank]) for name in ("weights", "gradients", "optimizer", "ema")}
    assert real_bytes(config, engine) == held, config.engine


def real_bytes(config: Config, engine: Any) -> dict[str, int]:
    ema = size(shard.tensors["ema"] for shard in engine.shards if "ema" in shard.tensors)
    moments = size(shard.tensors[kind] for shard in engine.shards for kind in KINDS if kind in shard.tensors)
    if config.engine.name == "fsdp2":
        stored = [p.to_local() for p in engine.module.parameters()]
        weights = sum(p.untyped_storage().nbytes() for p in stored)
        # Reduced gradients lie as the parameters do.
        gradients = sum(
            local.untyped_storage().nbytes()
            for p, local in zip(engine.module.parameters(), stored, strict=True)
            if p.requires_grad
        )
        return {"weights": weights, "gradients": gradients, "optimizer": moments, "ema": ema}
    # DeepSpeed's have paddings between the shards.
    moments = size(state[kind] for state in engine.optimizer.state.values() for kind in KINDS)
    zero, stage = engine._zero, config.engine.zero_stage
    masters = size(master_partitions(zero, stage))
    module = list(engine.module.module.parameters())
    if stage == 3:
        computed, gradients = size(p.ds_tensor for p in module), size([zero.grad_partitions_flat_buffer])
    else:
        computed = size(module)
        gradients = size(p for p in module if p.requires_grad) if stage == 1 else masters
    assert moments == MOMENTS * masters
    return {"weights": computed + masters, "gradients": gradients, "optimizer": moments, "ema": ema}


def size(tensors: Any) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_arithmetic_is_what_the_engines_do(tmp_path: Path) -> None:
    run_ranks(three_ranks, RANKS, tmp_path)
