"""The training loop. It does not know which engine, stage or parallel layout it has; what is optional is a callback."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rae_scale.config import Config
from rae_scale.data.collate import Batch
from rae_scale.data.loader import Loader
from rae_scale.engines import Engine, StepResult
from rae_scale.models.flops import peak_flops
from rae_scale.parallel import Mesh
from rae_scale.train.callbacks.base import Callback, Metrics
from rae_scale.train.meters import SumMeter, means, memory_bytes
from rae_scale.train.schedules import learning_rates
from rae_scale.train.signals import StopSignal
from rae_scale.train.stages.base import LossOutput, Stage

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything a training run consists of, and how far it is."""

    config: Config
    folder: Path
    mesh: Mesh
    device: torch.device
    stage: Stage
    engine: Engine
    batches: Loader[Batch]
    callbacks: list[Callback]
    stop: StopSignal = field(default_factory=StopSignal)
    step: int = 0
    """Global steps that are done: also the index of the next one, which keys its data and its noise."""
    skipped: int = 0
    """How many of them changed nothing because a loss or a gradient was not finite."""
    stopping: bool = False
    """A signal reached some rank: this step is the last. The same on all ranks."""

    @property
    def finished(self) -> bool:
        return self.stopping or self.step >= self.config.run.max_steps


def run_loop(run: Run) -> None:
    """Train until `run.max_steps` or a signal."""
    try:
        for callback in run.callbacks:
            callback.on_train_start(run)
        while not run.finished:
            metrics = global_step(run)
            for callback in run.callbacks:
                callback.on_step_end(run, metrics)
        for callback in run.callbacks:
            callback.on_train_end(run)
    finally:
        for callback in run.callbacks:
            callback.close()


def global_step(run: Run) -> Metrics:
    """One optimiser step over one global batch; counts it in `run.step` and returns its metrics."""
    started = time.perf_counter()
    micro_batches = next(run.batches)
    meter = SumMeter()
    meter.add("data_wait_s", time.perf_counter() - started, 0)
    # Sequence-parallel ranks have the same samples, so each counts its share of them.
    share = 1 / run.mesh.sp
    meter.add("images", share * sum(float(batch.has_image.sum()) for batch in micro_batches), 0)
    meter.add("tokens", share * sum(float(batch.attention_mask.sum()) for batch in micro_batches), 0)
    meter.add("flops", share * sum(run.stage.flops(batch) for batch in micro_batches), 0)
    lrs = learning_rates(run.config.optim, run.step, run.config.run.max_steps)

    result = run.engine.step(lrs) if accumulate(run, micro_batches, meter) else None
    if result is None or result.skipped:
        run.skipped += 1
        if result is not None:
            record_skip(run, "gradients", [])
    run.step += 1
    sums = meter.reduce(run.mesh.all_reduce, run.device)
    return step_metrics(run, sums, result, lrs, time.perf_counter() - started)


def accumulate(run: Run, micro_batches: list[Batch], meter: SumMeter) -> bool:
    """Forward and backward over the micro-batches. False if a loss was not finite on any rank: nothing is kept then."""
    totals = global_counts(run, micro_batches)
    for number, batch in enumerate(micro_batches, start=1):
        batch = batch.to(run.device)
        with run.engine.autocast():
            with torch.no_grad():
                inputs = run.stage.prepare(batch, run.step)
            output = run.stage.loss(run.engine.module, inputs, totals)
        meter.add("loss", output.loss, 0)
        for name, (total, count) in output.sums.items():
            meter.add(name, total, count)
        if not all_finite(run, output):
            run.engine.discard()
            record_skip(run, "loss", suspects(batch, output))
            return False
        run.engine.backward(output.loss, last=number == len(micro_batches))
    return True


def global_counts(run: Run, micro_batches: list[Batch]) -> dict[str, float]:
    """What normalises the losses of this step: the stage's counts over all micro-batches and ranks."""
    meter = SumMeter()
    for batch in micro_batches:
        for name, count in run.stage.counts(batch).items():
            meter.add(name, count, 0)
    # Sequence-parallel ranks have all counted the same samples.
    return {name: total / run.mesh.sp for name, (total, _) in meter.reduce(run.mesh.all_reduce, run.device).items()}


def all_finite(run: Run, output: LossOutput) -> bool:
    """Whether the loss is finite on every rank. The stop request travels with it, so all ranks stop at one step."""
    flags = torch.stack([~output.loss.detach().isfinite(), torch.tensor(run.stop.requested, device=run.device)])
    broken, stop = run.mesh.any(flags)
    run.stopping = run.stopping or stop
    return not broken


def suspects(batch: Batch, output: LossOutput) -> list[str]:
    """Ids of this rank's samples whose loss is not finite."""
    finite = output.per_sample.isfinite().tolist()
    return [sample_id for sample_id, ok in zip(batch.sample_ids, finite, strict=True) if not ok]


def record_skip(run: Run, reason: str, sample_ids: list[str]) -> None:
    """Say that step `run.step` changed nothing, in the log and in skipped.jsonl. Every rank calls this."""
    # Once each: tensor and sequence parallel ranks have the same samples.
    everyone = list(dict.fromkeys(sample_id for ids in run.mesh.gather_objects(sample_ids) for sample_id in ids))
    if not run.mesh.is_main:
        return
    size = run.config.data.global_batch_size
    entry = {
        "step": run.step + 1,
        "reason": f"{reason} not finite",
        "positions": [run.step * size, (run.step + 1) * size],
        "sample_ids": everyone,
    }
    with (run.folder / "skipped.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    named = f" of samples {', '.join(everyone)}" if everyone else ""
    logger.warning("step %d skipped: the %s%s is not finite; see skipped.jsonl", run.step + 1, reason, named)


def step_metrics(
    run: Run,
    sums: dict[str, tuple[float, float]],
    result: StepResult | None,
    lrs: dict[str, float],
    seconds: float,
) -> Metrics:
    """The line of the step that has just ended. What is not finite or was not measured is None."""
    totals = {name: sums.pop(name)[0] for name in ("loss", "images", "tokens", "flops", "data_wait_s")}
    flops_per_second = totals["flops"] / seconds / run.mesh.world_size
    peak = peak_flops(run.device)
    values: Metrics = {
        "step": run.step,
        "loss": totals["loss"],
        **means(sums),
        "grad_norm": result.grad_norm if result else None,
        **{f"grad_norm_{name}": norm for name, norm in (result.group_norms if result else {}).items()},
        **{f"lr_{name}": lr for name, lr in lrs.items()},
        "images_per_second": totals["images"] / seconds,
        "tokens_per_second": totals["tokens"] / seconds,
        "tflops": flops_per_second / 1e12,
        "mfu": flops_per_second / peak if peak else None,
        "step_s": seconds,
        "data_wait_s": totals["data_wait_s"] / (run.mesh.world_size // run.mesh.tp),
        "memory_bytes": memory_bytes(run.device),
        "skipped": run.skipped,
    }
    return {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
