"""The sections of the GPU check that step a whole model."""

from __future__ import annotations

from typing import Any

from rae_scale.bench import step
from rae_scale.bench.gpu_sections import Sizes
from rae_scale.bench.kernels import Way
from rae_scale.bench.record import Row
from rae_scale.bench.session import Session
from rae_scale.bench.setup import StepSetup
from rae_scale.bench.step_report import ceilings_of, compare_ways, profile_ours

Data = dict[str, Any]

LEAN = ("optim.moments=bf16", "engine.activation_checkpointing=full")


def measured(setup: StepSetup, way: Way, sizes: Sizes, rates: step.Rates, repeats: int, warm_up: int = 3) -> Row:
    found = step.measure_way(setup, way, Session(sizes.device, 1), rates, repeats=repeats, warm_up=warm_up)
    return Row({"kernels": way}, step.settings(setup, way), {}, *found)


def ways(sizes: Sizes) -> Data:
    """Ours, the reference operations call by call, and the same compiled, one after the other in one process."""
    setup = StepSetup(sizes.model, sizes.batch)
    rates = ceilings_of(sizes.device, small=sizes.dry)
    chosen: tuple[Way, ...] = ("ours", "eager") if sizes.dry else ("ours", "eager", "compile")
    rows = []
    for way in chosen:
        try:
            rows.append(measured(setup, way, sizes, rates, repeats=2 if sizes.dry else 10))
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"[:500]
            rows.append(Row({"kernels": way}, step.settings(setup, way), failed=failed))
    compare_ways(rows)
    return {"rates": rates, "ways": [row.flat() for row in rows], "settings": rows[0].settings}


def micro_batches(sizes: Sizes) -> Data:
    """Largest one of each size that fits without checkpointing, ours and with reference operations."""
    if sizes.device.type != "cuda":
        return {"skipped": "there is no GPU memory to fill"}
    compared: tuple[Way, ...] = ("ours", "eager")
    return {
        name: {way: step.largest_micro_batch(StepSetup(name, 1), sizes.device, way) for way in compared}
        for name in sizes.searched
    }


def largest_model(sizes: Sizes) -> Data:
    """One step of the largest model with bfloat16 moments and full activation checkpointing."""
    setup = StepSetup(sizes.largest_model, min(8, sizes.batch), overrides=LEAN)
    row = measured(setup, "ours", sizes, ceilings_of(sizes.device, small=sizes.dry), repeats=3, warm_up=2)
    return {"settings": row.settings, "ways": [row.flat()]}


def profiled(sizes: Sizes) -> Data:
    return profile_ours(StepSetup(sizes.model, sizes.batch), sizes.device, sizes.folder / "trace.json")
