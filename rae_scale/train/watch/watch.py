"""What a rank of a run tells about itself while it trains, and what it hears."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from rae_scale.config import Config
from rae_scale.config.schema import FaultConfig
from rae_scale.parallel import Mesh
from rae_scale.state.agreement import agree
from rae_scale.train.signals import StopSignal
from rae_scale.train.watch.accounts import Accounts, account
from rae_scale.train.watch.clock import COMPUTE, Clock, Phase
from rae_scale.train.watch.files import rank_name
from rae_scale.train.watch.flags import Flags, clear_flags
from rae_scale.train.watch.heartbeat import FOLDER, remove_heartbeats
from rae_scale.train.watch.journal import Kind, append_event, begin_attempt, new_event
from rae_scale.train.watch.ranklog import RankLog
from rae_scale.train.watch.status import State, Status
from rae_scale.train.watch.watchdog import Watchdog

logger = logging.getLogger(__name__)


class StopAsked(Exception):
    """A signal came before the first step: there is nothing to save."""


class Watch:
    """One rank's clock, stop request, heartbeat, log, status and journal. Does nothing but keep time until `begin`.

    Between `begin` and `close` the process is watched: it ends if it makes no progress. The training thread says where
    it is by `enter` and `phase`.
    """

    def __init__(self, fault: FaultConfig | None = None, log: RankLog | None = None) -> None:
        self.fault = fault or FaultConfig()
        self.clock = Clock(self.fault)
        self.stop = StopSignal()
        self._log = log or RankLog()
        self.stop_reason = ""
        """Which signal on which rank, once all ranks have agreed to stop."""
        self._closing = ExitStack()
        self._status: Status | None = None
        self._accounts: Accounts | None = None

    def begin(self, config: Config, mesh: Mesh) -> None:
        """A new attempt at the run. Collective.

        Raises:
            CheckpointError: a rank cannot write into the run's folder.
        """
        run_dir = Path(config.run.dir)
        attempt = agree(mesh, lambda: self._new_attempt(run_dir, mesh.world_size) if mesh.is_main else 0)[0]
        self.clock.restart()  # after the event that the journal counts from
        status = Status(run_dir, Flags(run_dir, attempt, mesh.rank), mesh.world_size, config.run.max_steps)
        watchdog = Watchdog(self.fault, self.clock, self.stop, status, self._log)

        def announce() -> None:
            self._log.open(run_dir / "logs" / str(attempt) / f"{rank_name(mesh.rank)}.log")
            watchdog.beat()
            if mesh.is_main:
                status.running(0)

        agree(mesh, announce)
        self._status = status
        self._closing.enter_context(self.stop)
        watchdog.start()
        self._closing.callback(watchdog.close)

    def _new_attempt(self, run_dir: Path, world_size: int) -> int:
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        events = begin_attempt(run_dir, host=socket.gethostname(), world_size=world_size)
        self._accounts = account(events)
        clear_flags(run_dir)
        remove_heartbeats(run_dir)
        return int(events[-1]["attempt"])

    def close(self) -> None:
        """End the watch. Nothing that can hang may follow."""
        self._closing.close()

    def enter(self, phase: Phase, step: int) -> None:
        """The training thread begins with `phase`, or gets on in it; `step` global steps are done."""
        self.clock.enter(phase, step)

    @contextmanager
    def phase(self, phase: Phase, step: int) -> Iterator[None]:
        """`enter(phase, step)` for what is inside, and back to where the thread was."""
        before = self.clock.place
        self.enter(phase, step)
        try:
            yield
        finally:
            self.enter(before.phase, before.step)

    def ready(self, step: int) -> None:
        """Everything is built and loaded; the loop begins at `step`."""
        self.enter(Phase.START, step)
        if self._is_main and self._status is not None:
            self._status.running(step)
        self.record("ready", step)

    def record(self, kind: Kind, step: int, **details: Any) -> None:
        """Write an event into the run's journal. Main rank only, nothing on others.

        A "rollback" to `step` has `from_step`, the number of steps that were done before.
        """
        if not self._is_main or self._status is None or self._accounts is None:
            return
        event = new_event(kind, self._status.flags.attempt, step, self.clock.seconds, **details)
        self._accounts.add(event)
        try:
            append_event(self._status.run_dir, event)
        except OSError as error:  # a full disk: the report will be less exact
            logger.warning("the event %r of step %d is missing in events.jsonl: %s", kind, step, error)

    def effective_time(self) -> float | None:
        """Productive over wall time of the whole run until now. None on ranks other than the main one."""
        if self._accounts is None:
            return None
        return self._accounts.effective_at(time.time(), self.clock.seconds.get(COMPUTE, 0.0))

    def stop_agreed(self, mesh: Mesh) -> bool:
        """Whether any rank was asked to stop. Collective, the same on all."""
        (stop,) = mesh.any(torch.tensor([self.stop.requested], device=mesh.device))
        if stop and not self.stop_reason:
            reasons = mesh.gather_objects(self.stop.reason)
            named = (f"{reason} on rank {rank}" for rank, reason in enumerate(reasons) if reason)
            # Whoever launched the run may ask by a flag in its folder, which is no rank's.
            self.stop_reason = next(named, "a request in the run's folder")
        return stop

    def leave_if_asked(self, mesh: Mesh) -> None:
        """For the time before the loop: raise StopAsked on all ranks if any was asked to stop. Collective."""
        if self.stop_agreed(mesh):
            raise StopAsked

    def end(self, state: State, step: int, reason: str = "") -> None:
        """How the attempt ended."""
        if self._status is None:
            return
        self.enter(Phase.END, step)
        self.record("end", step, state=state, reason=reason)
        if state == "failed" or self._is_main:
            self._status.end(state, step, reason)

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """Says how the attempt ended if what is inside does not: by an error, which goes on, or by StopAsked."""
        try:
            yield
        except StopAsked:
            logger.info("stopped before the first step: %s", self.stop_reason)
            self.end("requeue", self.clock.place.step, self.stop_reason)
        except BaseException as error:
            self._log.exception("this rank ends with an error", error)
            self._failed(error)
            raise

    def _failed(self, error: BaseException) -> None:
        if self._status is None:
            return
        reason = f"rank {self._status.flags.rank}: {type(error).__name__}: {error}"
        try:
            self._status.flags.raise_flag("failed")
            self.end("failed", self.clock.place.step, reason)
        except OSError as problem:  # `error` is what counts
            logger.warning("status.json could not be written: %s", problem)

    @property
    def _is_main(self) -> bool:
        return self._status is not None and self._status.flags.rank == 0
