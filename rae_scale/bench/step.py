"""A training step's time, rate and memory: our operators beside the reference functions, eager and compiled."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import rae_kernels
from rae_scale.bench.kernels import CHOICE, Way
from rae_scale.bench.memory import alive_after, allocated_after
from rae_scale.bench.setup import Inputs, Step, StepSetup
from rae_scale.bench.timing import measure_blocking, synchronize
from rae_scale.parallel.compile import compile_blocks

logger = logging.getLogger(__name__)

INPUT_SETS = 2

COLUMNS = {
    "way": "{way}",
    "ms": "{median_ms:.1f}",
    "10 - 90 %": "{low_ms:.1f} - {high_ms:.1f}",
    "images/s": "{images_per_s:.1f}",
    "TFLOP/s": "{tflops:.1f}",
    "of matmul rate": "{fraction_of_matmul:.1%}",
    "of peak": "{mfu:.1%}",
    "peak GB": "{peak_gb:.2f}",
    "activations GB": "{activation_gb:.3f}",
    "failed": "{failed}",
}


@contextmanager
def step_of(setup: StepSetup, way: Way, device: torch.device) -> Iterator[Step]:
    """A step whose operations run `way`; everything is freed afterwards."""

    def prepare(module: nn.Module) -> None:
        if way == "compile":
            compile_blocks(module, "blocks", device)

    step: Step | None = None
    try:
        with rae_kernels.use(CHOICE[way]):
            step = Step(setup, device, prepare)
            yield step
    finally:
        if step is not None:
            step.engine.close()
        del step
        free(device)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bench_way(
    setup: StepSetup,
    way: Way,
    device: torch.device,
    rates: Mapping[str, float | None],
    *,
    repeats: int = 10,
    warm_up: int = 3,
) -> dict[str, Any]:
    """Time and memory of one way. A way that does not fit into memory says so in `failed`.

    rates: "matmul_flops_per_s", measured, and "peak_flops_per_s", from the data sheet or None.
    """
    try:
        with step_of(setup, way, device) as step:
            return {"way": way, **time_step(step, rates, repeats, warm_up), **memory_of(step, way)}
    except torch.OutOfMemoryError as error:
        logger.warning("%s: %s", way, error)
        return {"way": way, "failed": "out of memory"}


def time_step(step: Step, rates: Mapping[str, float | None], repeats: int, warm_up: int) -> dict[str, Any]:
    batch, device = step.setup.batch, step.device
    sets = [step.inputs(batch, seed) for seed in range(INPUT_SETS)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # The optimizer waits for the gradient's norm, so a step ends when the host says so.
    work = [lambda inputs=inputs: step.run(inputs) for inputs in sets]
    timing = measure_blocking(work, device, repeats=repeats, warm_up=warm_up)
    flops = step.flops(batch) / timing.median
    peak, matmul = rates.get("peak_flops_per_s"), rates.get("matmul_flops_per_s")
    found: dict[str, Any] = {f"{name}_ms": value for name, value in timing.milliseconds().items()}
    found |= {"images_per_s": batch / timing.median, "tflops": flops / 1e12}
    found |= {"fraction_of_matmul": flops / matmul} if matmul else {}
    found |= {"mfu": flops / peak} if peak else {}
    found |= {"peak_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}
    return found


def memory_of(step: Step, way: Way) -> dict[str, Any]:
    """Bytes that forward leaves behind for backward: what grows with the batch, times the batch.

    On a GPU as the allocator counts it, from two sizes of batch, which removes what does not grow (bf16 copies of the
    weights). Elsewhere by a census, which cannot look into compiled functions.
    """
    batch = step.setup.batch
    if step.device.type == "cuda":
        if batch == 1:
            return {"saved_gb": left_behind(step, 1) / 1e9}
        half = batch // 2
        whole, part = left_behind(step, batch), left_behind(step, half)
        return {"saved_gb": whole / 1e9, "activation_gb": (whole - part) / (batch - half) * batch / 1e9}
    if way == "compile":
        return {}
    inputs = step.inputs(batch, 0)
    found = alive_after(lambda: step.forward(inputs), step.engine.module.parameters())
    return {"saved_gb": found.total / 1e9, "activation_gb": found.activations / 1e9}


def left_behind(step: Step, batch: int) -> int:
    inputs = step.inputs(batch, 0)
    # Backward once, for what libraries allocate at their first call at a size.
    step.engine.backward(step.forward(inputs), last=True)
    step.engine.discard()
    found = allocated_after(lambda: step.forward(inputs), step.device)
    assert found is not None
    return found


def largest_micro_batch(setup: StepSetup, device: torch.device, way: Way = "ours", limit: int = 4096) -> int:
    """Images per micro-batch that still fit, up to `limit`; 0 if not even one does. A whole step has to run.

    Raises:
        ValueError: `device` has no memory of its own to fill.
    """
    if device.type != "cuda":
        raise ValueError("--find-micro-batch fills a GPU's memory; there is none here")
    try:
        with step_of(setup, way, device) as step:
            return largest(lambda batch: fits(step, step.inputs, batch), limit)
    except torch.OutOfMemoryError:
        return 0


def fits(step: Step, draw: Callable[[int, int], Inputs], batch: int) -> bool:
    try:
        step.run(draw(batch, 0))
        synchronize(step.device)
        return True
    except torch.OutOfMemoryError:
        step.engine.discard()
        return False
    finally:
        free(step.device)


def largest(fits_: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` for which `fits_` holds, which does for all smaller ones; 0 if for none."""
    low, high = 0, 1
    while high <= limit and fits_(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > max(1, low // 32):  # to about 3 %
        middle = (low + high) // 2
        low, high = (middle, high) if fits_(middle) else (low, middle)
    return low


def settings(setup: StepSetup) -> dict[str, Any]:
    """For the record: what was stepped, with every setting of model, optimizer and engine."""
    config = setup.config()
    return {
        "model": setup.model,
        "batch": setup.batch,
        "tokens": setup.dit(config).num_tokens,
        "with_llm": setup.with_llm,
        "overrides": list(setup.overrides),
        "sections": {name: getattr(config, name).model_dump(mode="json") for name in ("model", "optim", "engine")},
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
