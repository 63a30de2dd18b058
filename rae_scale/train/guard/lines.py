"""What is written beside training, on a disk that may be full for a while."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rae_scale.train.loop import Run

logger = logging.getLogger(__name__)


def write_failed(run: Run, what: str, error: OSError) -> None:
    """A log of the main rank could not be written: goes on, or asks the run to stop, by `fault.on_save_failure`.

    Stopping is by request, so that all ranks end at one step and try to save.
    """
    stops = run.config.fault.on_save_failure == "stop"
    then = "the run stops after this step (fault.on_save_failure=stop)" if stops else "training goes on"
    logger.warning("%s cannot be written (%s); %s", what, error, then)
    if stops:
        run.watch.stop.request(f"fault.on_save_failure=stop, {what} cannot be written")


class LineFile:
    """A JSON lines file that is open for appending.

    A line is there whole or not at all. Lines that could not be written wait in memory, and are written with the next
    one that can be: what a full disk costs is what is still waiting when the process ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[bytes] = []
        self._descriptor: int | None = None

    def write(self, entry: dict[str, Any], run: Run) -> None:
        """Append `entry`. If that fails, `run` is told once, and again when it fails after it had succeeded."""
        self.waiting.append(json.dumps(entry, allow_nan=False).encode() + b"\n")
        try:
            self._write_out()
        except OSError as error:
            if len(self.waiting) == 1:
                write_failed(run, str(self.path), error)

    def close(self) -> None:
        """Write what waits, if it can be, and close."""
        if self.waiting:
            try:
                self._write_out()
            except OSError as error:
                logger.warning("%s: %d line(s) were never written (%s)", self.path, len(self.waiting), error)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write_out(self) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._descriptor).st_size
        try:
            data = memoryview(b"".join(self.waiting))
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            os.ftruncate(self._descriptor, size)  # takes no room, and no half of a line stays
            raise
        self.waiting.clear()
