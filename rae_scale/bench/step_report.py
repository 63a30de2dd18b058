"""The step benchmark whole. Apart from `reports`, as it needs the whole package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rae_scale.bench import profile, step
from rae_scale.bench.kernels import Way
from rae_scale.bench.reports import Report
from rae_scale.bench.results import environment, heading, table
from rae_scale.bench.setup import StepSetup
from rae_scale.bench.timing import rates
from rae_scale.models.flops import peak_flops


def bench_step(
    setup: StepSetup,
    device: torch.device,
    *,
    against: Sequence[Way] = (),
    repeats: int = 10,
    peak_tflops: float | None = None,
    find_micro_batch: bool = False,
    trace: Path | None = None,
    small: bool = False,
) -> Report:
    """peak_tflops: of the data sheet, instead of what is listed for this GPU. trace: also profile a step of ours, and
    write the trace there. small: ceilings from a small measurement, which says nothing.

    Raises:
        ValueError: the setup is no model or no setting.
    """
    settings = step.settings(setup)
    peak = peak_tflops * 1e12 if peak_tflops else peak_flops(device)
    found: dict[str, float | None] = {**rates(device, small=small), "peak_flops_per_s": peak}
    data: dict[str, Any] = {"environment": environment(device), "settings": settings, "rates": found}
    data["ways"] = [step.bench_way(setup, way, device, found, repeats=repeats) for way in ("ours", *against)]
    compare(data["ways"])
    text = [
        heading(f"Step of {setup.model}", data["environment"], {n: settings[n] for n in settings if n != "sections"}),
        ceilings(found),
        table(data["ways"], step.COLUMNS),
        *(
            f"\nagainst {row['way']}: {row['speedup']:.3f} x as fast" + memory(row)
            for row in data["ways"]
            if "speedup" in row
        ),
    ]
    if find_micro_batch:
        data["largest_micro_batch"] = step.largest_micro_batch(setup, device)
        text.append(f"\nlargest micro-batch: {data['largest_micro_batch']} images")
    if trace is not None:
        data["profile"] = profile_ours(setup, device, trace)
        text += ["\n" + table(data["profile"]["categories"], profile.COLUMNS)]
        text += ["\n" + table(data["profile"]["kernels"], profile.KERNEL_COLUMNS), f"\ntrace: {trace.name}"]
    return Report("step", data, "\n".join(text))


def compare(ways: list[dict[str, Any]]) -> None:
    """Add to every other way by what factor ours is faster, and what part of its activations ours needs."""
    ours = ways[0]
    for row in ways[1:]:
        if "median_ms" in row and "median_ms" in ours:
            row["speedup"] = row["median_ms"] / ours["median_ms"]
        if row.get("activation_gb") and "activation_gb" in ours:
            row["activations_of_ours"] = ours["activation_gb"] / row["activation_gb"]


def memory(row: dict[str, Any]) -> str:
    return f", {row['activations_of_ours']:.1%} of its activations" if "activations_of_ours" in row else ""


def ceilings(found: dict[str, float | None]) -> str:
    peak = found["peak_flops_per_s"]
    stated = f"stated dense peak {peak / 1e12:.1f} TFLOP/s" if peak else "no peak is stated for this device"
    matmul, copy = found["matmul_flops_per_s"] or 0.0, found["copy_bytes_per_s"] or 0.0
    return f"{stated}; measured in this process: bf16 matmul {matmul / 1e12:.1f} TFLOP/s, copy {copy / 1e9:.0f} GB/s\n"


def profile_ours(setup: StepSetup, device: torch.device, trace: Path) -> dict[str, Any]:
    with step.step_of(setup, "ours", device) as stepping:
        inputs = stepping.inputs(setup.batch, 0)
        for _ in range(2):
            stepping.run(inputs)
        return profile.profile_step(lambda: stepping.run(inputs), device, trace)
