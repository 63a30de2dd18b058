"""Saving while training goes on: a step waits for a copy to host memory, a thread writes the copy."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rae_scale.engines import Engine
from rae_scale.parallel import Mesh
from rae_scale.state.format import CheckpointError
from rae_scale.state.save import Description, Retention, describe_engine, save_checkpoint, to_write, write_checkpoint
from rae_scale.state.staging import Staging
from rae_scale.state.tensorfile import TensorToWrite

logger = logging.getLogger(__name__)
GB = 10**9


class Saver:
    """Saves one checkpoint at a time. All ranks call `save` and `wait` at the same steps.

    buffer_gb: host memory (10^9 bytes) on this rank for what waits to be written. A save that does not fit holds the
               training up until enough of it is on disk. 0 writes within `save`, one tensor at a time.
    """

    def __init__(self, mesh: Mesh, buffer_gb: float) -> None:
        self.staging: Staging | None = None
        """Of the newest save; None if nothing was staged yet."""
        self.failures = 0
        """How many saves have failed so far."""
        self._mesh = mesh
        self._saving_mesh = mesh.for_saving()
        self._limit = round(buffer_gb * GB)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self, run_dir: str | Path, step: int, engine: Engine, extra: Mapping[str, Any], retention: Retention
    ) -> None:
        """Begin to save what the engine holds now; it may go on training as soon as this returns. See
        `save_checkpoint` for what is written where. Collective.

        Raises:
            CheckpointError: the save before this one failed, or this one did and there is no buffer.
        """
        self.wait()
        started = time.perf_counter()
        if not self._limit:
            try:
                path = save_checkpoint(run_dir, step, engine, self._mesh, extra, retention.last, retention.every)
            except CheckpointError as error:
                self._failed(error, step)
                raise
            self._report(path, started)
            return
        description = describe_engine(run_dir, step, engine, self._mesh, extra, retention)
        # Views of the engine's memory: they are copied one by one below.
        pieces = list(engine.pieces())
        staging = self.staging = Staging(self._limit, pinned=self._mesh.device.type == "cuda")
        tensors = [to_write(piece, partial(staging.take, piece.box.numel)) for piece in pieces]
        # No daemon: a process that ends finishes its checkpoint first.
        self._thread = threading.Thread(
            target=self._write, args=(description, tensors, staging, started), name=f"save-{step}"
        )
        self._thread.start()
        try:
            for piece in pieces:
                if not staging.put(piece.tensor):
                    break
        except BaseException as error:
            staging.break_off(f"its tensors could not be copied ({type(error).__name__}: {error})")
            raise
        if self._mesh.is_main:
            logger.info("step %d is copied for saving; training waited %.1f s", step, time.perf_counter() - started)

    def wait(self) -> None:
        """Until the save in flight is on disk, if there is one. Collective: what failed on one rank is raised on all.

        Raises:
            CheckpointError: it could not be saved.
        """
        self.close()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Finish the save in flight. Raises nothing: after an error in training there is one to report already, and
        that of a save was logged."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(
        self, description: Description, tensors: Sequence[TensorToWrite], staging: Staging, started: float
    ) -> None:
        try:
            self._report(write_checkpoint(description, tensors, self._saving_mesh), started)
        except BaseException as error:
            self._failure = error
            self._failed(error, description.state["step"])
        finally:
            staging.abandon()

    def _failed(self, error: BaseException, step: int) -> None:
        self.failures += 1
        if not isinstance(error, CheckpointError):
            logger.warning("step %d could not be saved, %r", step, error)
        elif self._mesh.is_main:  # all ranks have agreed on it
            logger.warning("%s", error)

    def _report(self, path: Path, started: float) -> None:
        if self._mesh.is_main:
            logger.info("saved %s in %.1f s", path, time.perf_counter() - started)
