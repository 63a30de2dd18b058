"""The training loop. It does not know which engine, stage or parallel layout it has; what is optional is a callback."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rae_scale.config import Config
from rae_scale.data.collate import Batch
from rae_scale.data.loader import Loader
from rae_scale.engines import Engine, StepResult
from rae_scale.models.flops import peak_flops
from rae_scale.parallel import Mesh
from rae_scale.train.callbacks.base import Callback, Metrics
from rae_scale.train.guard.skipped_data import SkippedData
from rae_scale.train.guard.skips import Losses, record_skip
from rae_scale.train.guard.spikes import Spikes
from rae_scale.train.meters import SumMeter, means, memory_bytes
from rae_scale.train.schedules import learning_rates
from rae_scale.train.stages.base import LossOutput, Stage
from rae_scale.train.watch import Phase, Watch, take

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
    watch: Watch = field(default_factory=Watch)
    step: int = 0
    """Global steps that are done: also the index of the next one."""
    skipped: int = 0
    """How many of them changed nothing because a loss or a gradient was not finite, or a spike."""
    skipped_data: SkippedData = field(default_factory=SkippedData)
    """What rollbacks have left out."""
    open_batches: Callable[[int], Loader[Batch]] | None = None
    """Makes `batches` anew from a step on, for a rollback."""
    save_failures: int = 0
    """How many checkpoints could not be written since this process began."""
    stopping: bool = False
    """A signal reached some rank: no step follows. The same on all ranks."""

    def __post_init__(self) -> None:
        self.spikes = Spikes(self.config.fault)

    @property
    def batch(self) -> int:
        """Number of the global batch of the next step, which keys its data and its noise."""
        return self.skipped_data.batch_of(self.step)

    @property
    def finished(self) -> bool:
        return self.stopping or self.step >= self.config.run.max_steps


def run_loop(run: Run) -> None:
    """Train until `run.max_steps` or a signal."""
    try:
        for callback in run.callbacks:
            callback.on_train_start(run)
        while not run.finished:
            for callback in run.callbacks:
                callback.on_step_start(run)
            metrics = global_step(run)
            if metrics is None:
                break
            for callback in run.callbacks:
                callback.on_step_end(run, metrics)
        for callback in run.callbacks:
            callback.on_train_end(run)
    finally:
        for callback in run.callbacks:
            callback.close()


def global_step(run: Run) -> Metrics | None:
    """One optimiser step over one global batch; counts it in `run.step` and returns its metrics. None: a signal came
    before it, and all ranks have left it out."""
    started = time.perf_counter()
    micro_batches = next_batches(run)
    if micro_batches is None:
        return None
    meter = SumMeter()
    meter.add("data_wait_s", time.perf_counter() - started, 0)
    # Sequence-parallel ranks have the same samples, so each counts its share of them.
    share = 1 / run.mesh.sp
    meter.add("images", share * sum(float(batch.has_image.sum()) for batch in micro_batches), 0)
    meter.add("tokens", share * sum(float(batch.attention_mask.sum()) for batch in micro_batches), 0)
    meter.add("flops", share * sum(run.stage.flops(batch) for batch in micro_batches), 0)
    lrs = learning_rates(run.config.optim, run.step, run.config.run.max_steps)

    losses: list[tuple[list[str], Tensor]] = []
    finite = accumulate(run, micro_batches, meter, losses)
    # Before the update, which must not happen if the global loss is a spike.
    sums = meter.reduce(run.mesh.all_reduce, run.device)
    result = update(run, sums["loss"][0], lrs, losses) if finite else None
    run.step += 1
    run.watch.clock.step_done(kept=result is not None and not result.skipped)
    return step_metrics(run, sums, result, lrs, time.perf_counter() - started)


def next_batches(run: Run) -> list[Batch] | None:
    """This rank's share of the step's global batch, or None on all ranks if any was asked to stop.

    A rank whose storage hangs gives up then, after `fault.stop_grace_s`, so that it is no reason to lose what the
    others have computed.
    """
    stop = run.watch.stop
    run.watch.enter(Phase.DATA, run.step)
    batches = None if stop.requested else take(run.batches, lambda: stop.older_than(run.config.fault.stop_grace_s))
    run.watch.enter(Phase.STEP, run.step)
    run.stopping = run.watch.stop_agreed(run.mesh)
    return None if run.stopping else batches


def accumulate(run: Run, micro_batches: list[Batch], meter: SumMeter, losses: list[tuple[list[str], Tensor]]) -> bool:
    """Forward and backward over the micro-batches, whose samples and their losses are added to `losses`. False if a
    loss was not finite on any rank: nothing is kept then."""
    totals = global_counts(run, micro_batches)
    for number, batch in enumerate(micro_batches, start=1):
        run.watch.enter(Phase.STEP, run.step)
        batch = batch.to(run.device)
        with run.engine.autocast():
            with torch.no_grad():
                inputs = run.stage.prepare(batch, run.batch)
            output = run.stage.loss(run.engine.module, inputs, totals)
        losses.append((batch.sample_ids, output.per_sample))
        meter.add("loss", output.loss, 0)
        for name, (total, count) in output.sums.items():
            meter.add(name, total, count)
        if not all_finite(run, output):
            run.engine.discard()
            record_skip(run, "the loss is not finite", losses)
            return False
        run.engine.backward(output.loss, last=number == len(micro_batches))
    return True


def update(run: Run, loss: float, lrs: dict[str, float], losses: Losses) -> StepResult | None:
    """One optimiser step, unless the global `loss` or the gradient is a spike or not finite: then nothing changes.

    None if the gradient was not even looked at. All ranks decide alike.
    """
    if run.spikes.watches("loss"):
        # Tensor-parallel ranks have summed it in groups of their own: not always to the last bit the same.
        loss = run.mesh.from_main(loss)
        limit = run.spikes.limit("loss")
        if loss > limit:
            run.engine.discard()
            record_skip(run, f"the loss is a spike: {loss:.6g} is above {limit:.6g}", losses)
            return None
    limit = run.spikes.limit("grad_norm")
    result = run.engine.step(lrs, limit)
    if not result.skipped:
        run.spikes.keep(loss, result.grad_norm)
    elif math.isfinite(result.grad_norm):
        record_skip(run, f"the gradients are a spike: a norm of {result.grad_norm:.6g} is above {limit:.6g}", losses)
    else:
        record_skip(run, "the gradients are not finite", losses)
    return result


def global_counts(run: Run, micro_batches: list[Batch]) -> dict[str, float]:
    """What normalises the losses of this step: the stage's counts over all micro-batches and ranks."""
    meter = SumMeter()
    for batch in micro_batches:
        for name, count in run.stage.counts(batch).items():
            meter.add(name, count, 0)
    # Sequence-parallel ranks have all counted the same samples.
    return {name: total / run.mesh.sp for name, (total, _) in meter.reduce(run.mesh.all_reduce, run.device).items()}


def all_finite(run: Run, output: LossOutput) -> bool:
    """Whether the loss is finite on every rank."""
    (broken,) = run.mesh.any(~output.loss.detach().isfinite().reshape(1))
    return not broken


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
        "save_failures": run.save_failures,
        "effective_time": run.watch.effective_time(),
    }
    return {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
