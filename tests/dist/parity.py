"""Whole trainings of the awkward model, by the real stage and the real step of the loop, at any layout.

reference = train_alone(variant, steps)           one eager process
check_parity(cfg, parallel, variant, reference)   on every rank of a layout: same curve, same final state
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from awkward import CHANNELS, TOKENS, batch_of, inputs, scale_rae
from torch import Tensor, nn

from rae_scale.config import Config
from rae_scale.config.schema import DataConfig, EngineConfig, FlowConfig, GroupConfig, OptimConfig, ParallelConfig
from rae_scale.data.collate import Batch
from rae_scale.engines import Engine, build_engine
from rae_scale.parallel import Mesh, build_mesh, share_samples
from rae_scale.train.loop import Run, global_step
from rae_scale.train.stages import GenerationStage

BATCH, STEPS = 12, 10
CPU = torch.device("cpu")
# A step of each kind of batch, over and over: a rank may have no answer image at all, or no labelled token.
KINDS = ("guta", "tttt", "gagg", "gggtttuuuaaa", "aaaa", "ttgu")
OPTIM = OptimConfig(
    # A large eps: AdamW divides a gradient by its size, and where the true one is 0 (attention is blind to the key
    # bias) a small eps would make steps of rounding errors.
    groups={
        "llm": GroupConfig(lr=2e-3, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.01),
        "dit": GroupConfig(lr=4e-3, betas=(0.9, 0.95), eps=1e-3),
    },
    warmup_ratio=0.2,
    max_grad_norm=2.0,
    ema_decay=0.9,
)


@dataclass(frozen=True)
class Variant:
    ddt: bool = True
    llm_trains: bool = True


class FeatureBatch(Batch):
    """`pixels` holds the features."""

    def images(self) -> Tensor:
        return self.pixels


class Features(nn.Module):
    """In place of a frozen encoder: features that are a function of the sample, as the batches here have no pixels."""

    num_tokens, channels = TOKENS, CHANNELS

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels


def eager(checkpointing: str = "none") -> EngineConfig:
    return EngineConfig(name="eager", precision="fp32", activation_checkpointing=checkpointing)


def sharded(name: str, **settings: Any) -> EngineConfig:
    """zero1, zero2, zero3 or fsdp2."""
    if name.startswith("zero"):
        return EngineConfig(name="zero", zero_stage=int(name[-1]), precision="fp32", **settings)
    return EngineConfig(name=name, precision="fp32", **settings)


def micro_batches(mesh: Mesh, count: int, first_step: int = 0) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each step."""
    step = first_step
    while True:
        whole = inputs(step, BATCH, KINDS[step % len(KINDS)])
        rows = torch.arange(BATCH).chunk(mesh.dp_world)[mesh.dp_rank].chunk(count)
        yield [part_of(whole, part, step) for part in rows]
        step += 1


def part_of(whole: dict[str, Tensor], rows: Tensor, step: int) -> Batch:
    part = {name: tensor[rows] for name, tensor in whole.items()}
    batch = batch_of(part, step * BATCH + int(rows[0]))
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return FeatureBatch(**values | {"pixels": part["user_features"]})


def build_run(
    cfg: EngineConfig, mesh: Mesh, parallel: ParallelConfig, variant: Variant, micro_steps: int, folder: Path
) -> Run:
    model = scale_rae(ddt=variant.ddt)
    model.conditioner.llm.requires_grad_(variant.llm_trains)
    model.conditioner.mm_projector.requires_grad_(variant.llm_trains)
    stage = GenerationStage(model, Features(), FlowConfig(), seed=3)
    stage.drop_prob = 0.4  # 0.1 would be rare among 12 samples
    stage.flops = lambda batch: 0.0  # there is no formula for `Features`
    stage.encode = share_samples(stage.encoder, mesh)
    engine = build_engine(cfg, OPTIM, model, stage.group_of, mesh)
    config = Config(optim=OPTIM, engine=cfg, parallel=parallel, data=DataConfig(global_batch_size=BATCH))
    config = config.model_copy(update={"run": config.run.model_copy(update={"max_steps": STEPS})})
    batches: Any = micro_batches(mesh, micro_steps)
    return Run(config, folder, mesh, CPU, stage, engine, batches, callbacks=[])


State = dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class Trained:
    metrics: list[dict[str, Any]]
    state: State
    """Whole tensors by (kind, name)."""


def train_alone(variant: Variant, folder: Path, steps: int = STEPS) -> Trained:
    run = build_run(eager(), Mesh(CPU), ParallelConfig(), variant, 1, folder)
    metrics = [global_step(run) for _ in range(steps)]
    clipped = sum(line["grad_norm"] > OPTIM.max_grad_norm for line in metrics)
    assert steps < STEPS or clipped >= 3, "the curve must be one that clipping shapes"
    return Trained(metrics, {(p.kind, p.name): p.tensor.clone() for p in run.engine.pieces()})


def assert_same_curve(metrics: list[dict[str, Any]], expected: list[dict[str, Any]], what: str) -> None:
    """Losses within 1e-5, norms of gradients within 3e-5: the steps here are large, and what float32 rounds off grows
    with them. One process with two micro-batches, or with plain PyTorch for our operators, is 6e-6 off by step 6."""
    for ours, theirs in zip(metrics, expected, strict=True):
        for name, value in theirs.items():
            if name.startswith("loss") or name.startswith("grad_norm"):
                assert (ours[name] is None) == (value is None), (what, ours["step"], name)
                if value is not None:
                    allowed = (1e-5 if name.startswith("loss") else 3e-5) * abs(value) + 1e-9
                    assert abs(ours[name] - value) <= allowed, (what, ours["step"], name, ours[name], value)
            elif name in ("images", "tokens", "skipped"):
                assert ours[name] == value, (what, name)


def check_bf16(name: str, parallel: ParallelConfig, reference: Trained, folder: Path) -> None:
    """Mixed precision of the real model under an engine that gathers bfloat16 weights: it learns as float32 does."""
    mesh = build_mesh(parallel, CPU)
    cfg = sharded(name).model_copy(update={"precision": "bf16"})
    run = build_run(cfg, mesh, parallel, Variant(), 1, folder)
    for expected in reference.metrics[:4]:
        ours = global_step(run)
        assert abs(ours["loss"] - expected["loss"]) <= 0.03 * expected["loss"], (name, parallel, ours, expected)
        assert abs(ours["grad_norm"] - expected["grad_norm"]) <= 0.1 * expected["grad_norm"], (name, parallel, ours)
    run.engine.close()


def assert_same_state(engine: Engine, expected: State, what: str) -> None:
    """This rank's pieces are what one process came to, within 1e-5 of each tensor's size. Moments are of gradients,
    sums of many terms that cancel, of which float32 leaves fewer digits: 1e-4."""
    for piece in engine.pieces():
        whole = expected[piece.kind, piece.name]
        error = float((piece.tensor - whole[piece.box.slices]).abs().max()) if piece.tensor.numel() else 0.0
        tolerance = 1e-5 if piece.kind in ("weight", "ema") else 1e-4
        assert error <= tolerance * float(whole.abs().max()) + 1e-9, (what, piece.kind, piece.name, error)


def check_parity(
    cfg: EngineConfig,
    parallel: ParallelConfig,
    variant: Variant,
    reference: Trained,
    folder: Path,
    micro_steps: int = 2,
) -> None:
    mesh = build_mesh(parallel, CPU)
    run = build_run(cfg, mesh, parallel, variant, micro_steps, folder)
    what = f"{cfg.name}{cfg.zero_stage} {parallel} {variant}"
    metrics = [global_step(run) for _ in range(len(reference.metrics))]
    assert_same_curve(metrics, reference.metrics, what)
    assert_same_state(run.engine, reference.state, what)
    run.engine.close()
