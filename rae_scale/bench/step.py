"""A training step's time, rate and memory: our operators beside the reference functions, eager and compiled."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import rae_kernels
from rae_scale.bench.harness import Measured, check_relevant
from rae_scale.bench.kernels import CHOICE, Way
from rae_scale.bench.memory import alive_after, allocated_after
from rae_scale.bench.record import Measure, config_sections
from rae_scale.bench.session import Session
from rae_scale.bench.setup import Inputs, Step, StepSetup, check_parallel
from rae_scale.bench.timing import seconds_waited, synchronize
from rae_scale.parallel import Mesh

Rates = Mapping[str, float | None]
"""FLOP/s: "matmul_flops_per_s", measured, and "peak_flops_per_s", from the data sheet or None."""

INPUT_SETS = 2
SECTIONS = ("model", "optim", "engine", "parallel", "data.global_batch_size", "data.micro_batch_size")
"""Of the configuration, those that a step depends on."""

COLUMNS = {
    "setting": "{name}",
    "ms": "{step_ms:.1f}",
    "10 - 90 %": "{step_low_ms:.1f} - {step_high_ms:.1f}",
    "images/s": "{images_per_s:.1f}",
    "TFLOP/s": "{tflops:.1f}",
    "of matmul rate": "{fraction_of_matmul:.1%}",
    "of peak": "{mfu:.1%}",
    "peak GB": "{peak_gb:.2f}",
    "activations GB": "{activation_gb:.3f}",
    "power W": "{power_draw_w:.0f}",
    "ours is x as fast": "{speed_of_ours:.3f}",
}


@contextmanager
def step_of(setup: StepSetup, way: Way, mesh: Mesh) -> Iterator[Step]:
    """A step whose operations run `way`; everything is freed afterwards. Collective."""
    step: Step | None = None
    try:
        with rae_kernels.use(CHOICE[way]):
            step = Step(as_way(setup, way), mesh)
            yield step
    finally:
        if step is not None:
            step.engine.close()
        del step
        free(mesh.device)


def as_way(setup: StepSetup, way: Way) -> StepSetup:
    """Compiled blocks are a setting of the engine."""
    return setup.with_overrides(["engine.compile=blocks"]) if way == "compile" else setup


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_way(
    setup: StepSetup,
    way: Way,
    session: Session,
    rates: Rates,
    *,
    repeats: int = 10,
    warm_up: int = 3,
) -> Measured:
    """Time and memory of one way. Collective.

    Raises:
        ValueError: the setup is none, or not for these processes.
        torch.OutOfMemoryError: it does not fit.
    """
    mesh = session.mesh(setup.config().parallel)
    with step_of(setup, way, mesh) as step:
        timed = time_step(step, session, rates, repeats, warm_up)
        return timed._replace(values=timed.values | memory_of(step, way))


def time_step(step: Step, session: Session, rates: Rates, repeats: int, warm_up: int) -> Measured:
    """Of the slowest rank. Rates of all ranks together, FLOP/s of one."""
    device, count = step.device, step.micro_steps
    sets = [step.inputs(step.batch, seed) for seed in range(INPUT_SETS)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # The optimizer waits for the gradient's norm, so a step ends when the host says so.
    work = [lambda first=first: step.run([sets[(first + m) % INPUT_SETS] for m in range(count)]) for first in (0, 1)]
    seconds = session.slowest(seconds_waited(work, device, repeats=repeats, warm_up=warm_up))
    measures = {"step": Measure.of(seconds)}
    median = measures["step"].median
    flops = step.flops_per_image * step.global_batch / median / session.world_size
    peak, matmul = rates.get("peak_flops_per_s"), rates.get("matmul_flops_per_s")
    values: dict[str, Any] = {"images_per_s": step.global_batch / median, "tflops": flops / 1e12}
    values |= {"fraction_of_matmul": flops / matmul} if matmul else {}
    values |= {"mfu": flops / peak} if peak else {}
    if device.type == "cuda":
        measures["peak"] = Measure.count(max(session.gather(torch.cuda.max_memory_allocated(device))))
    return Measured(measures, values)


def memory_of(step: Step, way: Way) -> dict[str, Any]:
    """Bytes that forward leaves behind for backward: what grows with the batch, times the batch.

    On a GPU as the allocator counts it, from two sizes of batch, which removes what does not grow (bf16 copies of the
    weights). Elsewhere by a census, which cannot look into compiled functions nor into shards.
    """
    batch = step.batch
    if step.device.type == "cuda":
        if batch == 1:
            return {"saved_gb": left_behind(step, 1) / 1e9}
        half = batch // 2
        whole, part = left_behind(step, batch), left_behind(step, half)
        return {"saved_gb": whole / 1e9, "activation_gb": (whole - part) / (batch - half) * batch / 1e9}
    if way == "compile" or step.config.engine.compile != "none" or step.config.engine.name != "eager":
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
    """Images per micro-batch that still fit on one GPU, up to `limit`; 0 if not even one does. A whole step has to run.

    Raises:
        ValueError: `device` has no memory of its own to fill.
    """
    if device.type != "cuda":
        raise ValueError("--find-micro-batch fills a GPU's memory; there is none here")
    try:
        with step_of(setup, way, Mesh(device)) as step:
            return largest(lambda batch: fits(step, step.inputs, batch), limit)
    except torch.OutOfMemoryError:
        return 0


def fits(step: Step, draw: Callable[[int, int], Inputs], batch: int) -> bool:
    try:
        step.run([draw(batch, 0)])
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


def settings(setup: StepSetup, way: Way, benchmark: str = "step", more: Sequence[str] = ()) -> dict[str, Any]:
    """`Row.settings` of a step, or of a benchmark that needs one and depends on `more` of the configuration.

    Raises:
        ValueError: the setup is none, or has settings that neither depends on.
    """
    setup = as_way(setup, way)
    sections = (*SECTIONS, *more)
    check_relevant(benchmark, setup.overrides, sections)
    config = setup.config()
    check_parallel(setup, config.parallel)
    return {
        "kernels": way,
        "tokens": setup.dit(config).num_tokens,
        "with_llm": setup.with_llm,
        "text_tokens": setup.text_tokens if setup.with_llm else None,
        "config": config_sections(config, sections),
    }
