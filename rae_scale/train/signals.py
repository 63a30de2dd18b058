"""SIGTERM and SIGINT ask the run to stop after the step that is under way."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """While it is entered, a signal sets `requested` instead of ending the process.

    Further signals change nothing: launchers forward the Ctrl-C that the terminal has already sent to every process,
    and that second one must not interrupt the save. SIGQUIT (Ctrl-backslash) still ends the process at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
