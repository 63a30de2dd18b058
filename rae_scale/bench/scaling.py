"""How a step scales over the ranks of this machine: `bench step` started on 1, 2, 4, ... of them.

Weak scaling keeps the images per rank, strong scaling the images of the whole step. Efficiency is both times images/s
over what as many single ranks would reach: rate(n) / (n * rate(1)).
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from rae_scale.bench import step
from rae_scale.bench.chart import lines
from rae_scale.bench.harness import Benchmark, Case, Measured, Overrides, run_benchmark
from rae_scale.bench.record import Record, Row, facts_of, flop_count, read_record, short
from rae_scale.bench.session import Session
from rae_scale.bench.setup import StepSetup, step_flops

Mode = Literal["weak", "strong"]
Axis = Literal["dp_replicate", "dp_shard", "sp", "tp"]
MODES: tuple[Mode, ...] = get_args(Mode)
Launch = Callable[[int, Sequence[str], Path], Record]
"""(ranks, arguments of `rae-scale`, folder for its results) -> what `bench step` found."""

COLUMNS = {
    "setting": "{name}",
    "batch": "{batch}",
    "ms": "{step_ms:.1f}",
    "10 - 90 %": "{step_low_ms:.1f} - {step_high_ms:.1f}",
    "images/s": "{images_per_s:.1f}",
    "TFLOP/s per rank": "{tflops:.2f}",
    "of peak": "{mfu:.1%}",
    "efficiency": "{efficiency:.1%}",
    "peak GB": "{peak_gb:.2f}",
}


def bench_scaling(
    setup: StepSetup,
    session: Session,
    points: Sequence[Overrides] = ((),),
    *,
    ranks: Sequence[int],
    modes: Sequence[Mode] = MODES,
    axis: Axis = "dp_shard",
    step_options: Sequence[str] = (),
    launch: Launch | None = None,
    after_row: Callable[[Record], None] = lambda record: None,
) -> Record:
    """A row for each point, mode and number of ranks.

    setup: its batch is that of one rank under weak scaling, and of all together under strong scaling. axis: of
    `parallel.*`, which grows. step_options: of `bench step`, beside those that this one gives.

    Raises:
        ValueError: the setup is none, or there are not as many GPUs.
    """
    available = torch.cuda.device_count() if session.device.type == "cuda" else None
    if available is not None and max(ranks) > available:
        raise ValueError(f"--ranks={max(ranks)}, but this machine has {available} GPU(s); choose up to {available}")
    # As many threads for each rank however many there are, or else more ranks would only look slower.
    threads = max(1, (os.cpu_count() or 1) // max(ranks))
    run = launch or functools.partial(launch_step, threads=threads)

    def cases_of(point: Overrides) -> list[Case]:
        return [case_of(setup.with_overrides(point), mode, count) for mode in modes for count in ranks]

    def case_of(here: StepSetup, mode: Mode, count: int) -> Case:
        batch = here.config().data.global_batch_size * (count if mode == "weak" else 1)
        sized = here.with_overrides([f"parallel.{axis}={count}", f"data.global_batch_size={batch}"])
        formula, per_image = step_flops(sized)
        config, flops = sized.config(), flop_count(formula, per_image, encoder_counted=False)
        facts = facts_of(config, precision=config.engine.precision, kernels="ours", flops=flops)
        # A step on one rank is the same in both modes, but is measured for each.
        settings = step.settings(sized, "ours", "scaling") | {"mode": mode, "threads_per_rank": threads}
        measure = functools.partial(measure_ranks, run, sized, [*step_options, f"--device={session.device.type}"])
        return Case(settings, facts, measure, {"mode": mode, "ranks": facts["world_size"]})

    return run_benchmark(SCALING, points, cases_of, session, after_row=after_row)


def measure_ranks(run: Launch, setup: StepSetup, options: Sequence[str]) -> Measured:
    count = setup.config().parallel.world_size
    # The ceilings that `bench step` reports do not matter here.
    options = ["--small", *options]
    with tempfile.TemporaryDirectory(prefix="rae-scale-bench-") as folder:
        record = run(count, ["bench", "step", *arguments(setup), *options, "--out", folder], Path(folder))
    (row,) = record.rows
    if row.failed:
        raise ValueError(row.failed)
    return Measured(row.measures, {**row.values, "batch": setup.config().data.global_batch_size})


def arguments(setup: StepSetup) -> list[str]:
    """The command line of `bench step` that makes this setup."""
    given = [f"--model={setup.model}", f"--batch={setup.batch}", f"--llm={setup.llm}", *setup.overrides]
    given += [f"--tokens={setup.tokens}"] if setup.tokens is not None else []
    return given + (["--with-llm", f"--text-tokens={setup.text_tokens}"] if setup.with_llm else [])


def launch_step(ranks: int, given: Sequence[str], folder: Path, *, threads: int) -> Record:
    """With torchrun, one rank too: so that all numbers are measured in the same way.

    Raises:
        ValueError: a rank failed; the message is what it said last.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(
        [*torchrun, "-m", "rae_scale", *given], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"{ranks} rank(s) ended with status {done.returncode}: {last_words(done.stderr)}")
    return read_record(folder / "step.json")


LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Of this process, if it was launched; its own ranks get theirs from torchrun."""


def last_words(output: str) -> str:
    """The line that says what went wrong: ours, or the last exception's."""
    said = [line.strip() for line in output.splitlines() if line.strip()]
    ours = [line for line in said if line.startswith("rae-scale: error")]
    errors = [line for line in said if "Error" in line and "ChildFailedError" not in line]
    return (ours or errors or said or ["it said nothing"])[-1]


def add_efficiency(rows: list[Row]) -> None:
    """Relative to one rank, or to the smallest number there is of the same mode and point."""
    for row in rows:
        alike = [other for other in rows if other.measures and series(other) == series(row)]
        if row.measures and alike:
            base = min(alike, key=lambda other: other.varied["ranks"])
            growth = row.varied["ranks"] / base.varied["ranks"]
            row.values["efficiency"] = row.values["images_per_s"] / base.values["images_per_s"] / growth


def series(row: Row) -> str:
    return ", ".join(f"{short(key)} {value}" for key, value in row.varied.items() if key != "ranks")


CHART = lines("ranks", "efficiency", series, ("ranks", "efficiency"), log=False)
SCALING = Benchmark("scaling", "Scaling of a training step", COLUMNS, CHART, finish=add_efficiency)
