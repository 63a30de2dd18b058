"""Where the training thread is and what its time goes into."""

from __future__ import annotations

from typing import Any

import pytest

from rae_scale.config.schema import FaultConfig
from rae_scale.train.watch.clock import Clock, Phase

FAULT = FaultConfig(start_timeout_s=900, train_timeout_s=100, save_timeout_s=200, eval_timeout_s=300)


def walk(clock: Clock, now: Any, *stays: tuple[Phase, float]) -> None:
    for phase, seconds in stays:
        clock.enter(phase, 0)
        now.seconds += seconds


def test_time_is_counted_by_cause_and_a_step_when_it_is_over(clock_time: Any) -> None:
    clock = Clock(FAULT, clock_time)
    clock_time.seconds += 7
    walk(clock, clock_time, (Phase.DATA, 1), (Phase.STEP, 2), (Phase.STEP, 3))
    assert clock.seconds == {"start": 7, "data": 1}
    clock.step_done(kept=True)
    assert clock.seconds == {"start": 7, "data": 1, "compute": 5}
    assert (clock.place.phase, clock.place.step) == (Phase.LOG, 1)
    walk(clock, clock_time, (Phase.SAVE, 10), (Phase.EVALUATION, 20), (Phase.DATA, 1), (Phase.STEP, 4))
    clock.step_done(kept=False)
    assert clock.seconds == {"start": 7, "data": 2, "compute": 5, "save": 10, "evaluation": 20, "skipped": 4}


def test_a_step_that_is_cut_off_counts_as_nothing(clock_time: Any) -> None:
    clock = Clock(FAULT, clock_time)
    walk(clock, clock_time, (Phase.STEP, 50), (Phase.END, 1))
    assert clock.seconds == {"start": 0}


@pytest.mark.parametrize(
    ("phase", "time_out"),
    [(Phase.START, 900), (Phase.DATA, 100), (Phase.STEP, 100), (Phase.SAVE, 200), (Phase.EVALUATION, 300)],
)
def test_each_phase_has_its_time_out(clock_time: Any, phase: Phase, time_out: float) -> None:
    clock = Clock(FAULT, clock_time)
    clock.step_done(kept=True)
    clock.enter(phase, 1)
    assert clock.place.time_out == time_out


def test_the_first_step_may_take_as_long_as_the_start(clock_time: Any) -> None:
    clock = Clock(FAULT, clock_time)
    for phase in (Phase.DATA, Phase.STEP):
        clock.enter(phase, 0)
        assert clock.place.time_out == 900
    clock.step_done(kept=False)
    clock.enter(Phase.STEP, 1)
    assert clock.place.time_out == 100


def test_progress_within_a_phase_starts_its_time_anew(clock_time: Any) -> None:
    clock = Clock(FAULT, clock_time)
    walk(clock, clock_time, (Phase.STEP, 30))
    clock.enter(Phase.STEP, 0)
    assert clock.place.since == clock_time.seconds


def test_closing_has_a_minute_whatever_a_step_may_take(clock_time: Any) -> None:
    clock = Clock(FaultConfig(train_timeout_s=1), clock_time)
    clock.enter(Phase.END, 3)
    assert clock.place.time_out == 60
