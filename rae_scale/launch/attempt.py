"""One attempt: commands are started together and end together, and nothing of them stays behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rae_scale.launch.command import Command, Launch, NodeCommand, StopBy
from rae_scale.launch.processes import MARK, descendants, die_with_parent, kill_all, send, workers
from rae_scale.launch.requeue import read_end
from rae_scale.launch.shared_memory import SharedMemory
from rae_scale.launch.tee import Log, Tee
from rae_scale.launch.temporary import TemporaryFolder

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
OBSERVE_SECONDS = 1.0
# What the commands of other machines may take to end after the first has failed, and a command to end when terminated.
PEERS_S = 30.0
TERMINATE_S = 15.0
# No rank has this number: the request comes from outside.
OUTSIDE = 10**9


class Attempt:
    """environment: of the commands, with their own in addition. port: MASTER_PORT."""

    def __init__(self, launch: Launch, folder: Path, environment: Mapping[str, str], log: Log, port: int) -> None:
        self._launch, self._folder, self._environment, self._log = launch, folder, environment, log
        self._shared_memory = SharedMemory(port)
        self._temporary = TemporaryFolder(port)
        self._started: list[tuple[Command, subprocess.Popen[bytes]]] = []
        self._tees: list[Tee] = []

    def run(self, stop: threading.Event, grace_s: float) -> list[int]:
        """Exit statuses of the commands, negative for a signal. When `stop` is set they are asked to end, once."""
        for path, text in self._launch.files.items():
            write_private(path, text)
        try:
            several = len(self._launch.here) > 1
            for number in self._launch.here:
                self._start(self._launch.commands[number], several)
            self._wait(stop, grace_s)
            if any(process.returncode for _, process in self._started):
                # Killed ranks could not say it. Those on other machines may wait for them in a collective.
                self._raise_flag("failed")
        finally:
            self._clean_up()
        return [process.returncode for _, process in self._started]

    def _start(self, each: NodeCommand, several: bool) -> None:
        command = each.command
        environment = {**self._environment, **self._temporary.variables(), **command.environment}
        if command.stop_by is StopBy.STDIN:
            # A launch of its own on the other side, which may be this machine again.
            environment.pop(MARK, None)
        process = subprocess.Popen(
            command.argv,
            env=environment,
            stdin=subprocess.PIPE if command.stop_by is StopBy.STDIN else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # The terminal's Ctrl-C is for us alone, who ask once.
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
        self._started.append((command, process))
        assert process.stdout is not None and process.stderr is not None
        prefix = f"[{each.node.partition(',')[0]}] ".encode() if several else b""
        self._tees += [Tee(process.stdout, 1, self._log, prefix), Tee(process.stderr, 2, self._log, prefix)]

    def _wait(self, stop: threading.Event, grace_s: float) -> None:
        asked = False
        deadline, observed = float("inf"), 0.0
        while any(process.poll() is None for _, process in self._started):
            now = time.monotonic()
            if any(tee.hung_up.is_set() for tee in self._tees):
                stop.set()
            if stop.is_set() and not asked:
                asked, deadline = True, now + grace_s
                logger.info("asking the processes to stop; they have %.0f s to save", grace_s)
                self._ask()
            elif not asked and any(process.poll() for _, process in self._started):
                # One machine's command has failed; the others cannot go on without it.
                asked, deadline = True, now + PEERS_S
                self._ask()
            if now > deadline:
                logger.warning("not ended in time: killed")
                self._terminate()
                return
            if now > observed + OBSERVE_SECONDS:
                observed = now
                self._shared_memory.observe(descendants(os.getpid()))
            time.sleep(POLL_SECONDS)

    def _ask(self) -> None:
        for command, process in self._started:
            if process.poll() is not None:
                continue
            match command.stop_by:
                case StopBy.STDIN:
                    assert process.stdin is not None
                    process.stdin.close()
                case StopBy.LAUNCHER:
                    process.send_signal(signal.SIGUSR1)
                case StopBy.RUN_FOLDER if self._raise_flag("stop"):
                    pass
                case _:
                    # Not the launcher: torchrun and DeepSpeed kill 30 s later, and exit as if something had failed.
                    # Before it has started any, it is all there is.
                    asked = workers(process.pid)
                    for each in asked:
                        send(each, signal.SIGTERM)
                    if not asked:
                        process.terminate()

    def _raise_flag(self, flag: Literal["stop", "failed"]) -> bool:
        """Where every rank's watchdog looks for what others have to say. False if no rank is there to see it."""
        end = read_end(self._folder)
        if end.state != "running":
            return False
        try:
            (self._folder / "flags" / f"{end.attempt}-{flag}-{OUTSIDE}").write_text("said by the launcher\n")
        except OSError as error:
            logger.warning("cannot write into %s: %s", self._folder / "flags", error)
            return False
        return True

    def _terminate(self) -> None:
        """A command that has started processes on other machines gets a moment to end those."""
        for command, process in self._started:
            if process.poll() is None:
                process.kill() if command.stop_by is StopBy.WORKERS else process.terminate()
        deadline = time.monotonic() + TERMINATE_S
        for _, process in self._started:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _clean_up(self) -> None:
        for _, process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
        # A number that ended has its pid free for reuse; what it started has not.
        killed = kill_all(lambda: descendants(os.getpid()))
        if killed:
            logger.warning("killed %d process(es) that had outlived the launcher", killed)
        for tee in self._tees:
            tee.join()
        self._temporary.remove()
        removed = self._shared_memory.remove_left()
        if removed:
            logger.info("removed from /dev/shm what killed processes had left: %s", ", ".join(removed))


def write_private(path: Path, text: str) -> None:
    """Readable by the user alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
