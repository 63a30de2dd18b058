"""A grid of the fixed prompts `run.sample_prompts` every `run.sample_every` steps, drawn with the EMA weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from rae_scale.config.schema import SamplerConfig
from rae_scale.data.collate import Batch
from rae_scale.train.callbacks.base import Callback, Metrics
from rae_scale.train.guard.lines import write_failed
from rae_scale.train.sampling import sample_latents
from rae_scale.train.stages.generation import GenerationStage
from rae_scale.train.watch import Phase, StopAsked

if TYPE_CHECKING:
    from rae_scale.train.loop import Run


class Samples(Callback):
    """Writes `<folder>/step-00001000.png` and tells the other callbacks.

    Sharded engines gather weights for each forward, so every rank samples all prompts together; rank 0 writes.
    """

    main_only = False

    def __init__(
        self,
        folder: Path,
        prompts: Batch,
        stage: GenerationStage,
        decode: Callable[[Tensor], Tensor],
        cfg: SamplerConfig,
        every: int,
    ) -> None:
        self.folder = folder
        self.prompts = prompts
        self.stage = stage
        self.decode = decode
        self.cfg = cfg
        self.every = every

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        if run.step % self.every and run.step != run.config.run.max_steps:
            return
        with run.watch.phase(Phase.EVALUATION, run.step):
            try:
                self.draw(run)
            except StopAsked:  # who asked the run to stop will not wait for pictures
                run.stopping = True

    def draw(self, run: Run) -> None:
        """Raises StopAsked, on all ranks alike."""
        batch = self.prompts.to(run.device)
        with run.engine.using_ema(), run.engine.autocast():
            latents = sample_latents(
                self.stage.module,
                batch,
                self.cfg,
                alpha=self.stage.alpha,
                seed=run.config.run.seed,
                before_each=lambda: run.watch.leave_if_asked(run.mesh),
            )
            images = self.decode(latents).float().cpu()
        if run.mesh.is_main:
            path = self.folder / f"step-{run.step:08d}.png"
            try:
                self.folder.mkdir(exist_ok=True)
                save_grid(images, path)
            except OSError as error:
                path.unlink(missing_ok=True)  # half of a picture
                write_failed(run, str(path), error)
            for callback in run.callbacks:
                callback.on_samples(run, images, self.prompts.captions)


def save_grid(images: Tensor, path: Path) -> None:
    """Write pictures [N, 3, S, S] in [0, 1] as one PNG, about as many columns as rows."""
    columns = math.ceil(len(images) ** 0.5)
    blanks = images.new_ones(-len(images) % columns, *images.shape[1:])
    cells = torch.cat([images, blanks]).unflatten(0, (-1, columns))  # [rows, columns, 3, S, S]
    grid = cells.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [rows * S, columns * S, 3]
    Image.fromarray((grid * 255).round().byte().numpy()).save(path)
