"""Layers and engine together send what the formulas say: exactly, by kind and group."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from awkward import VOCAB
from harness import run_ranks
from parity import Variant, build_run, sharded

from rae_scale.config.schema import EngineConfig, ParallelConfig
from rae_scale.engines.communication import fsdp2_volume, specs_of, units_of
from rae_scale.models.packing import TextLayout
from rae_scale.parallel import Mesh, build_mesh, init_distributed, shutdown_distributed
from rae_scale.parallel.ledger import Ledger, Volume
from rae_scale.parallel.placement import Placement
from rae_scale.parallel.volume import MicroStep, layers_volume
from rae_scale.train.loop import global_counts

pytestmark = pytest.mark.dist

# The package has the function under this name.
linear_cross_entropy = sys.modules["rae_kernels.linear_cross_entropy"]
CPU = torch.device("cpu")


def labelled_here(layout: TextLayout, mesh: Mesh) -> int:
    """Labels in this rank's slice of the text."""
    share = -(-sum(layout.lengths) // mesh.sp)
    return sum(share * mesh.sp_rank <= token < share * (mesh.sp_rank + 1) for token in layout.labelled)


def check_step(cfg: EngineConfig, parallel: ParallelConfig, variant: Variant, micro_steps: int) -> None:
    mesh = build_mesh(parallel, CPU)
    run = build_run(cfg, mesh, parallel, variant, micro_steps, Path())
    lrs = {"llm": 1e-3, "dit": 1e-3}
    for step in range(3):
        batches = next(run.batches)
        totals = global_counts(run, batches)
        with Ledger(mesh) as ledger:
            for number, batch in enumerate(batches, start=1):
                with run.engine.autocast():
                    inputs = run.stage.prepare(batch, step)
                    output = run.stage.loss(run.engine.module, inputs, totals)
                run.engine.backward(output.loss, last=number == len(batches))
            run.engine.step(lrs)
        if step < 2:
            continue  # DeepSpeed traces the first one
        bf16 = cfg.precision == "bf16"
        model = run.stage.module
        layers = [
            layers_volume(
                model.dit.cfg,
                model.conditioner.llm.config,
                MicroStep(
                    batch=len(batch),
                    text_tokens=sum(layout.lengths),
                    labelled=labelled_here(layout, mesh),
                    product_bytes=2 if bf16 else 4,
                    weight_bytes=2 if bf16 else 4,
                    recomputed=cfg.activation_checkpointing == "full",
                ),
                parallel,
            )
            for batch in batches
            for layout in [TextLayout.of(batch.attention_mask, batch.labels)]
        ]
        expected = sum(layers, engine_volume(cfg, parallel, variant, micro_steps, run.engine.placements))
        assert ledger.volume() == expected, (cfg, parallel, sorted(ledger.volume().items()), sorted(expected.items()))
    run.engine.close()


def engine_volume(
    cfg: EngineConfig, parallel: ParallelConfig, variant: Variant, micro_steps: int, places: dict[str, Placement]
) -> Volume:
    from awkward import scale_rae

    from rae_scale.models.composite import group_of

    whole = scale_rae(ddt=variant.ddt)
    whole.conditioner.llm.requires_grad_(variant.llm_trains)
    whole.conditioner.mm_projector.requires_grad_(variant.llm_trains)
    specs = specs_of(whole, group_of, places)
    assert cfg.name == "fsdp2"
    return fsdp2_volume(units_of(whole, specs), parallel, cfg.precision, micro_steps)


def two_ranks() -> None:
    init_distributed(ParallelConfig(tp=2), "cpu")
    for parallel in (ParallelConfig(tp=2), ParallelConfig(sp=2)):
        check_step(sharded("fsdp2"), parallel, Variant(), 2)
        check_step(sharded("fsdp2", activation_checkpointing="full"), parallel, Variant(), 1)
        bf16 = sharded("fsdp2").model_copy(update={"precision": "bf16"})
        check_step(bf16, parallel, Variant(ddt=False, llm_trains=False), 1)
    linear_cross_entropy.LOGITS_BYTES = 7 * VOCAB * 4  # several chunks of logits, which backward computes again
    check_step(sharded("fsdp2"), ParallelConfig(tp=2), Variant(), 2)
    shutdown_distributed()


def test_two_ranks(tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, tmp_path)


def four_ranks() -> None:
    init_distributed(ParallelConfig(tp=2, sp=2), "cpu")
    check_step(sharded("fsdp2"), ParallelConfig(tp=2, sp=2), Variant(), 2)
    check_step(sharded("fsdp2"), ParallelConfig(tp=2, dp_shard=2), Variant(ddt=False), 1)
    shutdown_distributed()


def test_four_ranks(tmp_path: Path) -> None:
    run_ranks(four_ranks, 4, tmp_path)
