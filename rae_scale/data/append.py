"""Appending lines to a file that several processes share, on a disk that may be full."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


class AppendedLines:
    """Lines for the end of a file. What cannot be written now waits in memory for the next `write`.

    A line that had room only in part is written again, after a newline: no line is lost, and the torn one is not JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.waiting: list[bytes] = []
        self._torn = False
        self._complained = False

    def add(self, line: bytes) -> None:
        """line: with its newline. It is written by the next `write`."""
        self.waiting.append(line)

    def write(self) -> None:
        """Append all that waits, each line in one write to a file opened for appending."""
        if not self.waiting:
            return
        try:
            self._write()
        except OSError as error:
            if not self._complained:
                logger.warning("%s: %s; its lines wait in memory until they can be written", self.path, error.strerror)
            self._complained = True
        else:
            if self._complained:
                logger.warning("%s: can be written again, and nothing is missing in it", self.path)
            self._complained = False

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            while self.waiting:
                line = b"\n" + self.waiting[0] if self._torn else self.waiting[0]
                self._torn = os.write(descriptor, line) != len(line)
                if self._torn:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                del self.waiting[0]
        finally:
            os.close(descriptor)
