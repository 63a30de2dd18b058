"""`logs/<attempt>/rank-00003.log`: everything that one rank says, whatever reaches the common stream."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class RankLog(logging.Handler):
    """Keeps records until `open` tells the file: the attempt's number is not known when a process starts."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(FORMAT))
        self.file: TextIO | None = None
        self._early: list[logging.LogRecord] = []
        self._failed = False

    def open(self, path: Path) -> TextIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.lock:  # type: ignore[union-attr]
            self.file = path.open("a", encoding="utf-8")
            early, self._early = self._early, []
            for record in early:
                self.emit(record)
        return self.file

    def emit(self, record: logging.LogRecord) -> None:
        if self.file is None:
            self._early.append(record)
            return
        try:
            self.file.write(self.format(record) + "\n")
            self.file.flush()
        except (OSError, ValueError):
            self.handleError(record)

    def exception(self, text: str, error: BaseException) -> None:
        """Its traceback, here only: whoever catches `error` shows it to the others."""
        details = (type(error), error, error.__traceback__)
        self.handle(logging.LogRecord(__name__, logging.ERROR, "", 0, text, (), details))

    def handleError(self, record: logging.LogRecord) -> None:
        """Once: a full disk would otherwise put a traceback for every line into the common stream."""
        if not self._failed:
            self._failed = True
            print(f"rank log: {sys.exc_info()[1]}; further lines may be missing", file=sys.stderr)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        super().close()
