"""The same scalars as in `metrics.jsonl`, and the grids of sampled pictures, for TensorBoard."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rae_scale.train.callbacks.base import Callback, Metrics
from rae_scale.train.guard.lines import write_failed

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from rae_scale.train.loop import Run

RETRY_SECONDS = 300.0


class TensorBoard(Callback):
    """A file that cannot be written is given up, and another one begun some minutes later: what is missing in between,
    `metrics.jsonl` has."""

    def __init__(self, folder: Path, log_every: int) -> None:
        self.folder = folder
        self.log_every = log_every
        self.writer: SummaryWriter | None = None
        self.retry_at = 0.0

    def on_train_start(self, run: Run) -> None:
        self.attempt(run, lambda writer: None)

    def on_rollback(self, run: Run) -> None:
        self.close()
        self.attempt(run, lambda writer: None)

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        if run.step % self.log_every:
            return

        def add(writer: SummaryWriter) -> None:
            for name, value in metrics.items():
                if name != "step" and value is not None:
                    writer.add_scalar(tag(name), value, run.step)

        self.attempt(run, add)

    def on_samples(self, run: Run, images: Tensor, prompts: Sequence[str]) -> None:
        def add(writer: SummaryWriter) -> None:
            writer.add_images("samples", images, run.step)
            writer.add_text("prompts", "\n\n".join(prompts), run.step)

        self.attempt(run, add)

    def attempt(self, run: Run, add: Callable[[SummaryWriter], None]) -> None:
        """Add to the file that is open, or to a new one."""
        from torch.utils.tensorboard import SummaryWriter

        if time.monotonic() < self.retry_at:
            return
        try:
            if self.writer is None:
                # purge_step hides what was written after the checkpoint that the run continues from.
                self.writer = SummaryWriter(str(self.folder), purge_step=run.step + 1)
            add(self.writer)
        except OSError as error:  # of an earlier step, perhaps: a thread writes
            self.retry_at = time.monotonic() + RETRY_SECONDS
            write_failed(run, str(self.folder), error)
            self.close()

    def close(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()


def tag(name: str) -> str:
    """`loss_flow_bin_0` -> `loss/flow_bin_0`: TensorBoard folds what stands before the slash into one panel."""
    for panel in ("loss", "grad_norm", "lr"):
        if name == panel or name.startswith(panel + "_"):
            return f"{panel}/{name.removeprefix(panel).removeprefix('_') or 'total'}"
    return f"speed/{name}"
