"""The same scalars as in `metrics.jsonl`, and the grids of sampled pictures, for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rae_scale.train.callbacks.base import Callback, Metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from rae_scale.train.loop import Run


class TensorBoard(Callback):
    def __init__(self, folder: Path, log_every: int) -> None:
        self.folder = folder
        self.log_every = log_every
        self.writer: SummaryWriter | None = None

    def on_train_start(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run wrote after the checkpoint that this one continues from.
        self.writer = SummaryWriter(str(self.folder), purge_step=run.step + 1)

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        assert self.writer is not None
        if run.step % self.log_every:
            return
        for name, value in metrics.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(tag(name), value, run.step)

    def on_samples(self, run: Run, images: Tensor, prompts: Sequence[str]) -> None:
        assert self.writer is not None
        self.writer.add_images("samples", images, run.step)
        self.writer.add_text("prompts", "\n\n".join(prompts), run.step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def tag(name: str) -> str:
    """`loss_flow_bin_0` -> `loss/flow_bin_0`: TensorBoard folds what stands before the slash into one panel."""
    for panel in ("loss", "grad_norm", "lr"):
        if name == panel or name.startswith(panel + "_"):
            return f"{panel}/{name.removeprefix(panel).removeprefix('_') or 'total'}"
    return f"speed/{name}"
