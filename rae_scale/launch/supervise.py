"""Run a launch's commands until the run has finished, was stopped, or fails without getting any further.

A restart is the same command again: the training resumes by itself from its newest checkpoint. The launchers' own
restarts are not used: torchrun's reuse a store with the dead processes' addresses in it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from rae_scale.launch.attempt import Attempt
from rae_scale.launch.command import Launch
from rae_scale.launch.processes import MARK, become_reaper, kill_all, mark, stale
from rae_scale.launch.requeue import FAILED, REQUEUE, Ended, Restarts, Verdict, read_end
from rae_scale.launch.tee import Log
from rae_scale.launch.temporary import remove_stale

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
FIRST_WAIT_S, LONGEST_WAIT_S = 5.0, 300.0
POLL_SECONDS = 0.1
# How long the rank that says how the run ended may take longer than this node's processes.
LAST_WORD_S = 60.0


class Supervisor:
    """
    build: the launch and its MASTER_PORT, anew for each attempt.
    folder: of the run. trains: whether its status.json tells how it ended; other commands only have an exit status.
    restarts: None restarts nothing. grace_s: between a request to stop and a kill.
    """

    def __init__(
        self,
        build: Callable[[], tuple[Launch, int]],
        folder: Path,
        *,
        trains: bool,
        restarts: Restarts | None,
        grace_s: float,
        first_wait_s: float = FIRST_WAIT_S,
    ) -> None:
        self._build = build
        self._folder, self._trains, self._restarts = folder, trains, restarts
        self._grace_s, self._first_wait_s = grace_s, first_wait_s
        self._stop = threading.Event()

    def stop(self) -> None:
        """Ask for an end after the step that is under way. More requests change nothing."""
        self._stop.set()

    def stop_with_stdin(self) -> None:
        """Stop when standard input ends: whoever started this over a connection is gone, or wants it."""

        def wait() -> None:
            while os.read(0, 4096):
                pass
            self.stop()

        threading.Thread(target=wait, daemon=True).start()

    def run(self) -> int:
        """Returns the exit status: 0 finished, 75 stopped and to be started again, else failed.

        Call it from the main thread.

        Raises:
            ValueError: the run is being launched on this machine already.
        """
        become_reaper()
        self._begin_alone()
        log = Log(self._folder / "logs" / f"node-{socket.gethostname()}.log")
        previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            while True:
                status = self._attempt(log)
                if status is not None:
                    return status
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            log.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop()

    def _begin_alone(self) -> None:
        """Two launches of one run would write the same checkpoints; what a killed one has left is in the way."""
        orphans, alive = stale(self._folder)
        if alive and self._trains:
            raise ValueError(
                f"run.dir={self._folder}: process {alive[0]} on this machine is running it already; wait for it, stop "
                f"it with kill {alive[0]}, or choose another run.dir"
            )
        if orphans:
            killed = kill_all(lambda: stale(self._folder)[0])
            logger.warning("killed %d process(es) of an earlier launch that had died", killed)
        remove_stale()

    def _attempt(self, log: Log) -> int | None:
        """One attempt. Returns the exit status, or None to go on with another one."""
        before = read_end(self._folder)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", MARK: mark(self._folder)}
        launch, port = self._build()
        attempt = Attempt(launch, self._folder, environment, log, port)
        statuses = attempt.run(self._stop, self._grace_s)
        status = max((code if code >= 0 else 128 - code for code in statuses), default=0)
        if not self._trains:
            return status
        end = self._last_word(before, status)
        if status == 0 and not end.state:
            return 0  # It had nothing to train: a dry run, or settings to print.
        return self._judge(end, status)

    def _last_word(self, before: Ended, status: int) -> Ended:
        """How the attempt ended. Another node may not have written it yet."""
        deadline = time.monotonic() + (LAST_WORD_S if status == 0 else 0)
        while True:
            end = read_end(self._folder)
            if end == before:
                end = Ended("", before.step)
            if end.state != "running" or time.monotonic() >= deadline:
                return end
            time.sleep(POLL_SECONDS)

    def _judge(self, end: Ended, status: int) -> int | None:
        if end.state == "finished":
            verdict = Verdict.FINISHED if self._restarts is None else self._restarts.judge(end)
        elif self._stop.is_set():
            logger.info("stopped: %s; the same command goes on", end)
            return FAILED if end.state == "failed" else REQUEUE
        elif self._restarts is None:
            logger.info("%s", end)
            return REQUEUE if end.state == "requeue" else status or FAILED
        else:
            verdict = self._restarts.judge(end)
        if verdict is Verdict.FINISHED:
            return 0
        if verdict is Verdict.REQUEUE:
            # Somebody asked a training process, not this one, and may mean that it is to run elsewhere.
            logger.info("%s", end)
            return REQUEUE
        assert self._restarts is not None
        failures = self._restarts.failures
        if verdict is Verdict.GIVE_UP:
            logger.error("%s: failure %d in a row without a further step, given up", end, failures)
            return status or FAILED
        wait = min(self._first_wait_s * 2 ** (failures - 1), LONGEST_WAIT_S)
        logger.warning("%s: starting again in %.0f s (failure %d in a row)", end, wait, failures)
        return REQUEUE if self._stop.wait(wait) else None


def configure_logging() -> None:
    """This process's own words, on stderr: they belong to no rank."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s launch %(levelname)s %(message)s", "%H:%M:%S"))
    package = logging.getLogger("rae_scale.launch")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
