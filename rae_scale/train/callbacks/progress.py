"""What the person at the terminal sees: one live line with the time left, or plain lines in a log file."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rae_scale.train.callbacks.base import Callback, Metrics

if TYPE_CHECKING:
    from rae_scale.train.loop import Run

logger = logging.getLogger(__name__)

PLAIN_LINE_SECONDS = 10.0  # a log file needs no line per step, metrics.jsonl has them all
SMOOTHING = 0.95  # weight of the past in the step time that the ETA is made from


class ProgressLine(Callback):
    def __init__(self, log_every: int) -> None:
        self.log_every = log_every
        self.console = Console(stderr=True)
        self.live: Progress | None = None
        self.step_seconds: float | None = None
        self.last_line = float("-inf")

    def on_train_start(self, run: Run) -> None:
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.live = Progress(*columns, TextColumn("{task.fields[status]}"), console=self.console)
            self.live.add_task(run.config.stage, total=run.config.run.max_steps, completed=run.step, status="")
            self.live.start()

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        seconds = float(metrics["step_s"] or 0.0)
        past = seconds if self.step_seconds is None else self.step_seconds
        self.step_seconds = SMOOTHING * past + (1 - SMOOTHING) * seconds
        last = run.step == run.config.run.max_steps
        if run.step % self.log_every and not last:
            return
        status = describe(metrics, self.step_seconds * (run.config.run.max_steps - run.step))
        if self.live is not None:
            self.live.update(self.live.task_ids[0], completed=run.step, status=status)
        elif last or time.monotonic() - self.last_line >= PLAIN_LINE_SECONDS:
            self.last_line = time.monotonic()
            logger.info("step %d/%d  %s", run.step, run.config.run.max_steps, status)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()


def describe(metrics: Metrics, seconds_left: float) -> str:
    """The few numbers that say whether the run is well."""
    parts = [
        f"{label} {value:{spec}}"
        for label, key, spec in (
            ("loss", "loss", ".4f"),
            ("flow", "loss_flow", ".4f"),
            ("text", "loss_text", ".4f"),
            ("grad", "grad_norm", ".3g"),
            ("img/s", "images_per_second", ".1f"),
        )
        if (value := metrics.get(key)) is not None
    ]
    if metrics.get("mfu") is not None:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    if metrics.get("skipped"):
        parts.append(f"skipped {metrics['skipped']}")
    return "  ".join([*parts, f"ETA {timedelta(seconds=round(seconds_left))}"])
