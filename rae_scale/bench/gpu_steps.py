"""The sections of the GPU check that step a whole model."""

from __future__ import annotations

from typing import Any

from rae_scale.bench import step
from rae_scale.bench.gpu_sections import Sizes
from rae_scale.bench.setup import StepSetup
from rae_scale.bench.step_report import compare, profile_ours
from rae_scale.bench.timing import rates
from rae_scale.models.flops import peak_flops

Data = dict[str, Any]

LEAN = ("optim.moments=bf16", "engine.activation_checkpointing=full")


def measured_rates(sizes: Sizes) -> dict[str, float | None]:
    return {**rates(sizes.device, small=sizes.dry), "peak_flops_per_s": peak_flops(sizes.device)}


def ways(sizes: Sizes) -> Data:
    """Ours, the reference operations call by call, and the same compiled, one after the other in one process."""
    setup = StepSetup(sizes.model, sizes.batch)
    found = measured_rates(sizes)
    rows = []
    for way in ("ours", "eager") if sizes.dry else ("ours", "eager", "compile"):
        try:
            rows.append(step.bench_way(setup, way, sizes.device, found, repeats=2 if sizes.dry else 10))  # type: ignore[arg-type]
        except Exception as error:
            rows.append({"way": way, "failed": f"{type(error).__name__}: {error}"[:500]})
    compare(rows)
    return {"settings": step.settings(setup), "rates": found, "ways": rows}


def micro_batches(sizes: Sizes) -> Data:
    """Largest one of each size that fits without checkpointing, ours and with reference operations."""
    if sizes.device.type != "cuda":
        return {"skipped": "there is no GPU memory to fill"}
    return {
        name: {way: step.largest_micro_batch(StepSetup(name, 1), sizes.device, way) for way in ("ours", "eager")}  # type: ignore[arg-type]
        for name in sizes.searched
    }


def largest_model(sizes: Sizes) -> Data:
    """One step of the largest model with bfloat16 moments and full activation checkpointing."""
    setup = StepSetup(sizes.largest_model, min(8, sizes.batch), overrides=LEAN)
    row = step.bench_way(setup, "ours", sizes.device, measured_rates(sizes), repeats=3, warm_up=2)
    return {"settings": step.settings(setup), "ways": [row]}


def profiled(sizes: Sizes) -> Data:
    return profile_ours(StepSetup(sizes.model, sizes.batch), sizes.device, sizes.folder / "trace.json")
