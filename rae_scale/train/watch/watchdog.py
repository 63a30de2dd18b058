"""The thread that watches the training thread: it writes heartbeats, passes stops on, and ends a rank that is stuck.

A rank is stuck when it made no progress within its phase's time-out and no other rank that is behind has time left.
Then every rank writes its stacks, the first that noticed names the culprits, and all end: within `DYING_SECONDS` of the
time-out, with `STALLED`. The interpreter's own timer, which needs neither this thread nor the global lock, does the
same for a rank whose code never gives the lock back; its stacks are in the rank's log.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from rae_scale.config.schema import FaultConfig
from rae_scale.train.signals import StopSignal
from rae_scale.train.watch.clock import Clock, Phase
from rae_scale.train.watch.culprits import MISSED_BEATS, Culprits, describe, find_culprits, time_left
from rae_scale.train.watch.files import rank_name
from rae_scale.train.watch.flags import Flags
from rae_scale.train.watch.heartbeat import Heartbeat, read_heartbeats, write_heartbeat
from rae_scale.train.watch.ranklog import RankLog
from rae_scale.train.watch.stacks import training_thread, write_stacks
from rae_scale.train.watch.status import Status

logger = logging.getLogger(__name__)

STALLED = 86
"""Exit status of a rank that was stuck or waited for one that was."""
POLL_SECONDS = 2.0
STACKS_SECONDS = 4.0  # how long the stacks of the others are waited for
VERDICT_SECONDS = STACKS_SECONDS + 1  # how long a rank waits for the one that names the culprits
DYING_SECONDS = 9.5
FAILED_SECONDS = 30.0  # how long a rank may go on after another one has failed


class Watchdog:
    """Of one rank; `start` it when the attempt's number is known, `close` it when nothing can hang any more.

    log: where the interpreter's timer writes stacks; open by then.
    """

    def __init__(self, fault: FaultConfig, clock: Clock, stop: StopSignal, status: Status, log: RankLog) -> None:
        self._fault = fault
        self._clock = clock
        self._stop = stop
        self._status = status
        self._flags: Flags = status.flags
        self._run_dir: Path = status.run_dir
        self._log = log
        self._host = socket.gethostname()
        self._poll_s = min(POLL_SECONDS, fault.heartbeat_s)
        self._stale_s = MISSED_BEATS * fault.heartbeat_s + self._poll_s
        self._awaited: Sequence[int] = ()
        self._extension = 0.0
        self._extended_since = 0.0
        self._next_beat = 0.0
        self._failure_seen: float | None = None
        self._complained: set[str] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._arm(self._clock.place.time_out)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        with self._complain_once("heartbeats/"):
            self.beat()

    def beat(self, where: str | None = None, waiting: bool = False) -> None:
        """Write this rank's heartbeat now."""
        place, now = self._clock.place, time.time()
        beat = Heartbeat(
            rank=self._flags.rank,
            host=self._host,
            pid=os.getpid(),
            attempt=self._flags.attempt,
            step=place.step,
            phase=place.phase.value,
            since=now - (self._clock.now() - place.since),
            time_out=place.time_out,
            time=now,
            seconds=self._clock.seconds,
            where=where,
            waiting=waiting,
        )
        write_heartbeat(self._run_dir, beat)

    def _watch(self) -> None:
        while not self._closed.wait(self._poll_s):
            left = self._time_left()
            self._arm(left)
            with self._complain_once("heartbeats/"):
                if self._clock.now() >= self._next_beat:
                    self._next_beat = self._clock.now() + self._fault.heartbeat_s
                    self.beat()
            with self._complain_once("flags/"):
                self._exchange_flags()
            if left <= 0 and self._failure_seen is None and not self._others_have_time():
                self._die()

    def _arm(self, seconds: float) -> None:
        """Set the interpreter's timer to when this thread should have ended the process, at the latest."""
        file = self._log.file
        assert file is not None, "the log is open before a rank is watched"
        faulthandler.dump_traceback_later(max(seconds, 0) + DYING_SECONDS, exit=True, file=file)

    def _time_left(self) -> float:
        """Of the training thread in its phase, seconds."""
        place = self._clock.place
        if place.since != self._extended_since:
            self._extension, self._extended_since = 0.0, place.since
        return place.since + place.time_out + self._extension - self._clock.now()

    def _others_have_time(self) -> bool:
        """Whether this rank waits for ranks whose phase may last longer. They are looked at again soon: the heartbeat
        of one that has died looks the same for a while."""
        ranks, self._awaited = self._awaited or range(self._status.world_size), ()
        beats, culprits, now = self._look(ranks)
        left = time_left(beats, culprits, now)
        if left > 0 and not culprits.silent and self._flags.rank not in culprits.behind:
            self._awaited = (self._flags.rank, *culprits.behind)
            self._extension += min(left, self._stale_s)
            return True
        return len(ranks) < self._status.world_size and self._others_have_time()

    def _look(self, ranks: Sequence[int], silence_s: float = 0.0) -> tuple[dict[int, Heartbeat], Culprits, float]:
        """silence_s: for how long no rank has written a heartbeat, since all are writing stacks or wait for them."""
        now = time.time()
        beats: dict[int, Heartbeat] = {}
        with self._complain_once("heartbeats/"):
            beats = read_heartbeats(self._run_dir, ranks, self._flags.attempt)
        return beats, find_culprits(beats, ranks, now, self._stale_s + silence_s), now

    def _exchange_flags(self) -> None:
        if self._stop.arrived():
            self._flags.raise_flag("stop")
        raised = self._flags.raised()
        if raised["stop"]:
            self._stop.request()
        if raised["stalled"]:
            self._die()
        if raised["failed"] and self._clock.place.phase is not Phase.END:
            self._outlive(raised["failed"][0])

    def _outlive(self, rank: int) -> None:
        """A rank has failed. Over gloo that is an error on this one at once; over NCCL it waits, and not every launcher
        ends the ranks of other machines."""
        if self._failure_seen is None:
            self._failure_seen = self._clock.now()
        elif self._clock.now() - self._failure_seen > FAILED_SECONDS:
            logger.error("rank %d failed %.0f s ago; this one ends with it", rank, FAILED_SECONDS)
            os._exit(STALLED)

    def _die(self) -> NoReturn:
        """Write stacks, find the culprits or wait for who does, and end the process whatever happens."""
        try:
            self._arm(0)
            leads = self._flags.first("verdict")
            where, waiting = training_thread()
            # In this order: who finds the stacks finds a heartbeat that says where this rank is.
            self.beat(where, waiting)
            write_stacks(self._stacks_of(self._flags.rank), self._header())
            self._flags.raise_flag("stalled")
            if leads:
                self._wait(STACKS_SECONDS, lambda: all(map(self._has_stacks, range(self._status.world_size))))
                self._pass_verdict()
            else:
                self._wait(VERDICT_SECONDS, lambda: self._flags.exists("ended"))
        except BaseException:
            logger.exception("this rank is stuck, and its stacks could not be written")
        finally:
            os._exit(STALLED)

    def _pass_verdict(self) -> None:
        beats, culprits, now = self._look(range(self._status.world_size), STACKS_SECONDS)
        place = self._clock.place
        text = describe(culprits, beats, now)
        logger.error(
            "no progress for %.0f s in phase %s (step %d); stacks of all ranks are in %s\n%s",
            self._clock.now() - place.since,
            place.phase,
            place.step + 1,
            self._stacks_of(0).parent,
            text,
        )
        self._status.end("failed", place.step, f"stalled in phase {place.phase}: {text}")

    def _header(self) -> str:
        place = self._clock.place
        seconds = self._clock.now() - place.since
        return (
            f"rank {self._flags.rank} on {self._host}, pid {os.getpid()}: step {place.step + 1}, {place.phase} for "
            f"{seconds:.1f} s\n"
        )

    def _stacks_of(self, rank: int) -> Path:
        return self._run_dir / "stalls" / str(self._flags.attempt) / f"{rank_name(rank)}.txt"

    @staticmethod
    def _wait(seconds: float, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            time.sleep(0.1)

    @contextlib.contextmanager
    def _complain_once(self, what: str) -> Iterator[None]:
        """A folder that cannot be written or read is no reason to stop training."""
        try:
            yield
        except OSError as error:
            if what not in self._complained:
                self._complained.add(what)
                logger.warning("%s in %s: %s; said once", what, self._run_dir, error)

    def _has_stacks(self, rank: int) -> bool:
        return self._stacks_of(rank).is_file()
