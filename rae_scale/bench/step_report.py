"""The step benchmark whole: its cases, and what its report says beside the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rae_scale.bench import profile, step
from rae_scale.bench.chart import bars
from rae_scale.bench.harness import Benchmark, Case, Measured, Overrides, run_benchmark
from rae_scale.bench.kernels import Way
from rae_scale.bench.record import Record, Row, facts_of, flop_count
from rae_scale.bench.results import table
from rae_scale.bench.session import Session
from rae_scale.bench.setup import StepSetup, step_flops
from rae_scale.bench.timing import rates
from rae_scale.models.flops import peak_flops
from rae_scale.parallel import Mesh


def bench_step(
    setup: StepSetup,
    session: Session,
    points: Sequence[Overrides] = ((),),
    *,
    against: Sequence[Way] = (),
    repeats: int = 10,
    warm_up: int = 3,
    peak_tflops: float | None = None,
    find_micro_batch: bool = False,
    trace: Path | None = None,
    small: bool = False,
    after_row: Callable[[Record], None] = lambda record: None,
) -> Record:
    """A row for each point and way. Collective.

    peak_tflops: of the data sheet, instead of what is listed for this GPU. find_micro_batch: also, on one GPU. trace:
    profile a step of ours, and write the trace there. small: ceilings from a small measurement, which says nothing.

    Raises:
        ValueError: the setup is no model or no setting, or something is asked for that this device or sweep has not.
    """
    if find_micro_batch and session.device.type != "cuda":
        raise ValueError("--find-micro-batch fills a GPU's memory; there is none here")
    if session.world_size > 1 and (find_micro_batch or trace is not None):
        raise ValueError("--find-micro-batch and --profile look at one process; start one")
    if trace is not None and len(points) > 1:
        raise ValueError("--profile looks at one setting; leave --sweep out, or profile each by itself")
    found = ceilings_of(session.device, peak_tflops, small=small)

    def cases_of(point: Overrides) -> list[Case]:
        here = setup.with_overrides(point)
        cases = []
        for way in ("ours", *against):
            settings = step.settings(here, way)
            config = step.as_way(here, way).config()
            formula, per_image = step_flops(here)
            flops = flop_count(formula, per_image, encoder_counted=False)
            facts = facts_of(config, precision=config.engine.precision, kernels=way, flops=flops)
            varied = {"kernels": way} if against else {}
            cases.append(Case(settings, facts, partial(measure, here, way), varied))
        return cases

    def measure(here: StepSetup, way: Way) -> Measured:
        measured = step.measure_way(here, way, session, found, repeats=repeats, warm_up=warm_up)
        if find_micro_batch and way == "ours":
            measured.values["largest_micro_batch"] = step.largest_micro_batch(here, session.device)
        return measured

    facts: dict[str, Any] = {"ceilings": found}
    record = run_benchmark(STEP, points, cases_of, session, facts=facts, after_row=after_row)
    if trace is not None:
        record.facts["profile"] = profile_ours(setup.with_overrides(points[0]), session.device, trace)
    return record


def ceilings_of(device: torch.device, peak_tflops: float | None = None, *, small: bool) -> dict[str, float | None]:
    """FLOP/s and bytes/s that a step's are held against: two measured now, one from the data sheet."""
    return {**rates(device, small=small), "peak_flops_per_s": peak_tflops * 1e12 if peak_tflops else peak_flops(device)}


def compare_ways(rows: Iterable[Row]) -> None:
    """Say of every other way how many times as fast ours is with the same settings, and what part of its activations
    ours needs."""
    ours: dict[str, Row] = {}
    for row in rows:
        point = str({name: value for name, value in row.varied.items() if name != "kernels"})
        if row.varied.get("kernels") == "ours":
            ours[point] = row
        elif point in ours and "step" in row.measures and "step" in ours[point].measures:
            row.values["speed_of_ours"] = row.measures["step"].median / ours[point].measures["step"].median
            own, other = ours[point].values.get("activation_gb"), row.values.get("activation_gb")
            row.values |= {"activations_of_ours": own / other} if own and other else {}


def notes(record: Record) -> list[str]:
    lines = [ceilings(record.facts["ceilings"])]
    for row in record.rows:
        if "speed_of_ours" in row.values:
            memory = row.values.get("activations_of_ours")
            needs = f", with {memory:.1%} of its activations" if memory else ""
            lines.append(f"{row.name}: ours is {row.values['speed_of_ours']:.3f} x as fast{needs}")
        if "largest_micro_batch" in row.values:
            lines.append(f"{row.name}: largest micro-batch {row.values['largest_micro_batch']} images")
    found = record.facts.get("profile")
    if found:
        lines += [table(found["categories"], profile.COLUMNS), table(found["kernels"], profile.KERNEL_COLUMNS)]
    return lines


def ceilings(found: dict[str, float | None]) -> str:
    peak = found["peak_flops_per_s"]
    stated = f"stated dense peak {peak / 1e12:.1f} TFLOP/s" if peak else "no peak is stated for this device"
    matmul, copy = found["matmul_flops_per_s"] or 0.0, found["copy_bytes_per_s"] or 0.0
    return f"{stated}; measured in this process: bf16 matmul {matmul / 1e12:.1f} TFLOP/s, copy {copy / 1e9:.0f} GB/s"


def profile_ours(setup: StepSetup, device: torch.device, trace: Path) -> dict[str, Any]:
    with step.step_of(setup, "ours", Mesh(device)) as stepping:
        inputs = [stepping.inputs(stepping.batch, 0)] * stepping.micro_steps
        for _ in range(2):
            stepping.run(inputs)
        return profile.profile_step(lambda: stepping.run(inputs), device, trace)


STEP = Benchmark("step", "Training step", step.COLUMNS, bars("step"), compare_ways, notes)
