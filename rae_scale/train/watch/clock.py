"""Where the training thread is, since when, for how long it may be there, and what its time went into."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from rae_scale.config.schema import FaultConfig


class Phase(StrEnum):
    START = "start"
    LOG = "log"
    """What callbacks do after a step, but for the next two."""
    SAVE = "save"
    EVALUATION = "evaluation"
    DATA = "data"
    STEP = "step"
    END = "end"


ORDER = {phase: place for place, phase in enumerate(Phase)}
"""As ranks go through them between counting one step and counting the next."""

END_SECONDS = 60.0  # for closing files, workers and groups, whatever a step may take

COMPUTE = "compute"
SKIPPED = "skipped"
"""What the time of STEP went into, which is known when the step is over."""


@dataclass(frozen=True)
class Place:
    """phase: entered at `since` (monotonic seconds), with `step` global steps done. time_out: seconds that it may
    last."""

    phase: Phase
    step: int
    since: float
    time_out: float


class Clock:
    """The training thread moves it, other threads read `place` and `seconds`; both are replaced, never changed."""

    def __init__(self, fault: FaultConfig, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.seconds: dict[str, float] = {}
        """Of each phase that is over, of STEP's as `COMPUTE` or `SKIPPED`. The step that is under way is in none."""
        self._fault = fault
        self._step_seconds = 0.0
        self._first = True
        self.place = Place(Phase.START, 0, now(), self._time_out(Phase.START))

    def restart(self) -> None:
        """Count from now on."""
        self.seconds = {}
        self.place = Place(Phase.START, 0, self.now(), self._time_out(Phase.START))

    def enter(self, phase: Phase, step: int) -> None:
        """Also where the phase is the same: then it says that there is progress."""
        left, now = self.place, self.now()
        if left.phase in (Phase.STEP, Phase.LOG):
            self._step_seconds += now - left.since
        else:
            self._add(left.phase, now - left.since)
        self.place = Place(phase, step, now, self._time_out(phase))

    def step_done(self, kept: bool) -> None:
        """The step under way has ended; not `kept`: it changed nothing. What follows it is counted with the next."""
        self.enter(Phase.LOG, self.place.step + 1)
        self._add(COMPUTE if kept else SKIPPED, self._step_seconds)
        self._step_seconds = 0.0
        self._first = False

    def _add(self, cause: str, seconds: float) -> None:
        self.seconds = {**self.seconds, cause: self.seconds.get(cause, 0.0) + seconds}

    def _time_out(self, phase: Phase) -> float:
        fault = self._fault
        if self._first and phase in (Phase.DATA, Phase.STEP):
            # Workers start, kernels compile, caches fill.
            return max(fault.start_timeout_s, fault.train_timeout_s)
        return {
            Phase.START: fault.start_timeout_s,
            Phase.SAVE: fault.save_timeout_s,
            Phase.EVALUATION: fault.eval_timeout_s,
            Phase.END: END_SECONDS,
        }.get(phase, fault.train_timeout_s)
