"""SIGTERM, SIGINT and SIGUSR1 ask the run to stop after the step that is under way."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """While it is entered, a signal sets `requested` instead of ending the process.

    Further signals change nothing: launchers forward the Ctrl-C that the terminal has already sent to every process,
    and that second one must not interrupt the save. SIGQUIT (Ctrl-backslash) still ends the process at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self.reason = ""
        """The signal, on the rank that got it."""
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_pipe = -1

    def request(self, reason: str = "") -> None:
        """Also called by the watchdog's thread."""
        if not self.requested:
            self.reason = reason
            self._since = time.monotonic()
            self.requested = True

    def older_than(self, seconds: float) -> bool:
        """Whether the stop was requested at least so long ago."""
        return self.requested and time.monotonic() - self._since >= seconds

    def arrived(self) -> bool:
        """`requested`, for another thread: Python runs no handler while the main thread waits in a collective."""
        if self._pipe is not None:
            try:
                numbers = os.read(self._pipe[0], 4096)
            except BlockingIOError:
                numbers = b""
            for number in numbers:
                if number in SIGNALS:
                    self.request(signal.Signals(number).name)
        return self.requested

    def __enter__(self) -> StopSignal:
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_pipe)
        assert self._pipe is not None
        for end in self._pipe:
            os.close(end)
        self._pipe = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)
