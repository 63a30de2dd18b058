"""Checkpoint folders that DeepSpeed itself writes, of states that are known: run on gloo ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from awkward import scale_rae
from parity import OPTIM, sharded
from torch import Tensor

from rae_scale.config.schema import ParallelConfig
from rae_scale.engines import build_engine, zero
from rae_scale.engines.base import Kind
from rae_scale.models.composite import ScaleRAE, group_of
from rae_scale.parallel import build_mesh, init_distributed, shutdown_distributed
from rae_scale.parallel.boxes import Box

STEP, OPTIMIZER_STEP = 7, 5
REFERENCE = "reference.pt"
"""What DeepSpeed's own `zero_to_fp32` makes of a checkpoint, beside it."""


@dataclass(frozen=True)
class Layout:
    """frozen: the language model does not train."""

    stage: int
    tp: int = 1
    precision: str = "fp32"
    frozen: bool = False
    sub_group_size: int = 10**9

    def parallel(self, world_size: int) -> ParallelConfig:
        return ParallelConfig(tp=self.tp, dp_shard=world_size // self.tp)


LAYOUTS: Mapping[str, Layout] = {
    "zero1": Layout(1, frozen=True),
    "zero2": Layout(2, frozen=True),
    "zero3": Layout(3, sub_group_size=20_000),
    "zero3-bf16": Layout(3, precision="bf16", frozen=True),
    "zero1-tp2": Layout(1, tp=2),
    "zero3-tp2": Layout(3, tp=2, frozen=True, sub_group_size=20_000),
}


def model_of(layout: Layout) -> ScaleRAE:
    model = scale_rae()
    if layout.frozen:
        model.conditioner.llm.requires_grad_(False)
        model.conditioner.mm_projector.requires_grad_(False)
    return model


def expected_state(layout: Layout) -> dict[tuple[Kind, str], Tensor]:
    """What the checkpoints of `layout` hold, by kind and name."""
    state: dict[tuple[Kind, str], Tensor] = {}
    for name, parameter in model_of(layout).named_parameters():
        weight = parameter.detach()
        if not parameter.requires_grad:
            state["weight", name] = weight.bfloat16() if layout.precision == "bf16" else weight
            continue
        state["weight", name] = weight
        state["exp_avg", name], state["exp_avg_sq", name] = -0.01 * weight, weight.square()
    return state


def write_all(folder: str) -> None:
    """On every rank: every layout's known state in DeepSpeed's engine, and `save_checkpoint`."""
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        parallel = layout.parallel(int(os.environ["WORLD_SIZE"]))
        if number == 0:
            init_distributed(parallel, "cpu")
        write_one(Path(folder) / name, layout, parallel)
    shutdown_distributed()


def write_one(folder: Path, layout: Layout, parallel: ParallelConfig) -> None:
    mesh = build_mesh(parallel, torch.device("cpu"))
    cfg = sharded(f"zero{layout.stage}").model_copy(update={"precision": layout.precision})
    with small_groups(layout.sub_group_size):
        engine = build_engine(cfg, OPTIM, model_of(layout), group_of, mesh)
    state = expected_state(layout)

    def read(kind: Kind, name: str, box: Box) -> Tensor | None:
        found = state.get((kind, name))
        return None if found is None else found[box.slices]

    engine.load_pieces(read, OPTIMIZER_STEP)
    engine.module.global_steps = STEP
    engine.module.save_checkpoint(str(folder), tag=f"global_step{STEP}")
    engine.close()
    if mesh.rank == 0 and layout.tp == 1:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        torch.save(get_fp32_state_dict_from_zero_checkpoint(str(folder)), folder / REFERENCE)


@contextlib.contextmanager
def small_groups(size: int) -> Iterator[None]:
    """Stage 3 cuts parameters into sub-groups of `size` elements. DeepSpeed's own size would make one of a small
    model."""
    plain = zero.deepspeed_config

    def deepspeed_config(*args: Any) -> dict[str, Any]:
        config = plain(*args)
        config["zero_optimization"]["sub_group_size"] = size
        return config

    zero.deepspeed_config = deepspeed_config
    try:
        yield
    finally:
        zero.deepspeed_config = plain
