"""Checkpoints every `run.save_every` steps, and always after the last step or the one at which a signal stops; and the
way back to one after `fault.max_skips_in_row` skipped steps."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from rae_scale.state import CheckpointError, Retention, Saver
from rae_scale.state.space import checkpoint_bytes, to_come, warn_if_short
from rae_scale.train.callbacks.base import Callback, Metrics
from rae_scale.train.guard.rollback import roll_back, rollback_is_due
from rae_scale.train.resume import progress
from rae_scale.train.watch import Phase

if TYPE_CHECKING:
    from rae_scale.train.loop import Run

logger = logging.getLogger(__name__)


class Checkpoints(Callback):
    """Training goes on as soon as `saver` has copied the state; when this callback's `on_train_end` returns, the last
    checkpoint is on disk.

    A checkpoint that cannot be written leaves the older ones as they are. `fault.on_save_failure` says whether training
    then ends or goes on to the next one; without its last one no run ends well.

    saved: goes into every checkpoint: the settings, and what a resume is checked against.
    """

    main_only = False

    def __init__(self, saved: dict[str, Any], saver: Saver) -> None:
        self.saved = saved
        self.saver = saver
        self.size = 0
        self.step = 0
        """What the newest checkpoint is of, even if it is not on disk yet."""

    def on_train_start(self, run: Run) -> None:
        self.step = run.step
        self.size = checkpoint_bytes(run.engine, run.mesh)
        settings = run.config.run
        keep_last = settings.keep_last if settings.save_every else 0  # then the last step's is the only one
        if run.mesh.is_main:
            warn_if_short(run.folder, self.size, to_come(run.folder, keep_last))

    def on_step_start(self, run: Run) -> None:
        if rollback_is_due(run):
            with run.watch.phase(Phase.SAVE, run.step):
                self.finish_save(run)
                roll_back(run)

    def on_rollback(self, run: Run) -> None:
        self.step = run.step

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        run.save_failures = self.saver.failures
        if save_is_due(run):
            self.save(run)

    def on_train_end(self, run: Run) -> None:
        with run.watch.phase(Phase.SAVE, run.step):
            if run.step != self.step:  # a signal came after it
                self.save(run)
            self.saver.wait()

    def save(self, run: Run) -> None:
        """Begin to save `run.step`. Collective."""
        with run.watch.phase(Phase.SAVE, run.step):
            self.begin_save(run)
        self.step = run.step
        run.watch.record("save", run.step)

    def begin_save(self, run: Run) -> None:
        self.finish_save(run)
        settings = run.config.run
        if run.mesh.is_main:
            warn_if_short(run.folder, self.size, 1)
        extra = {**self.saved, **progress(run)}
        retention = Retention(settings.keep_last, settings.keep_every)
        try:
            self.saver.save(run.folder, run.step, run.engine, extra, retention)
        except CheckpointError as error:  # written within `save`, it is known at once
            if run.finished:
                raise
            self.judge(run, error)

    def close(self) -> None:
        self.saver.close()

    def finish_save(self, run: Run) -> None:
        """Until the save in flight has succeeded, or failed and training may go on. Collective."""
        try:
            self.saver.wait()
        except Exception as error:
            self.judge(run, error)

    def judge(self, run: Run, error: Exception) -> None:
        """Raise `error`, a save's, if it ends the training. All ranks have one and decide alike."""
        # What is no matter of disks, such as memory or a defect, is known to the rank that it happened to.
        (is_defect,) = run.mesh.any(torch.tensor([not isinstance(error, CheckpointError)], device=run.device))
        if is_defect or run.config.fault.on_save_failure == "stop":
            raise error
        if run.mesh.is_main:
            logger.warning(
                "training goes on without that checkpoint (fault.on_save_failure=continue); %d could not be written "
                "so far. Until one can, a restart repeats the steps since the one before",
                self.saver.failures,
            )


def save_is_due(run: Run) -> bool:
    """Whether a checkpoint is made of `run.step`."""
    every = run.config.run.save_every
    return run.finished or (every > 0 and run.step % every == 0)
