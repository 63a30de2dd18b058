"""Checkpoints every `run.save_every` steps, and always after the last step or the one at which a signal stops."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from rae_scale.state import save_checkpoint
from rae_scale.train.callbacks.base import Callback, Metrics

if TYPE_CHECKING:
    from rae_scale.train.loop import Run

logger = logging.getLogger(__name__)


class Checkpoints(Callback):
    """`saved` goes into every checkpoint: the settings, and what a resume is checked against."""

    main_only = False

    def __init__(self, saved: dict[str, Any]) -> None:
        self.saved = saved

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        every = run.config.run.save_every
        if not run.finished and (every == 0 or run.step % every):
            return
        started = time.perf_counter()
        extra = {**self.saved, "skipped": run.skipped}
        path = save_checkpoint(run.folder, run.step, run.engine, run.mesh, extra, run.config.run.keep_last)
        if run.mesh.is_main:
            logger.info("saved %s in %.1f s", path, time.perf_counter() - started)
