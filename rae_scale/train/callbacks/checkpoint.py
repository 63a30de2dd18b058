"""Checkpoints every `run.save_every` steps, and always after the last step or the one at which a signal stops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rae_scale.state import Retention, Saver
from rae_scale.train.callbacks.base import Callback, Metrics

if TYPE_CHECKING:
    from rae_scale.train.loop import Run


class Checkpoints(Callback):
    """Training goes on as soon as `saver` has copied the state; when this callback's `on_train_end` returns, the last
    checkpoint is on disk.

    saved: goes into every checkpoint: the settings, and what a resume is checked against.
    """

    main_only = False

    def __init__(self, saved: dict[str, Any], saver: Saver) -> None:
        self.saved = saved
        self.saver = saver

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        settings = run.config.run
        if not run.finished and (settings.save_every == 0 or run.step % settings.save_every):
            return
        extra = {**self.saved, "skipped": run.skipped}
        self.saver.save(run.folder, run.step, run.engine, extra, Retention(settings.keep_last, settings.keep_every))

    def on_train_end(self, run: Run) -> None:
        self.saver.wait()

    def close(self) -> None:
        self.saver.close()
