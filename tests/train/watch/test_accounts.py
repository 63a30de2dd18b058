"""Productive time, and what became of the rest. All times are made up, so every number can be checked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rae_scale.train.watch.accounts import Accounts, account


def event(kind: str, attempt: int, time: float, step: int | None = None, **more: Any) -> dict[str, Any]:
    seconds = {name: more.pop(name) for name in list(more) if name in ("start", "data", "save", "compute", "skipped")}
    return {"event": kind, "attempt": attempt, "time": time, "step": step, "seconds": seconds, **more}


def lost(accounts: Accounts) -> dict[str, float]:
    return {cause: round(seconds, 6) for cause, seconds in accounts.lost.items() if seconds}


def check_sum(accounts: Accounts) -> None:
    assert accounts.productive_s + sum(accounts.lost.values()) == pytest.approx(accounts.wall_s)


STRAIGHT = [
    event("begin", 1, 0),
    event("ready", 1, 10, 0, start=10),
    event("save", 1, 100, 50, start=10, data=5, compute=80, save=4),
    event("end", 1, 200, 100, start=10, data=10, compute=165, save=8, skipped=6, state="finished"),
]


def test_a_run_without_interruption() -> None:
    accounts = account(STRAIGHT)
    assert (accounts.attempts, accounts.steps, accounts.wall_s, accounts.productive_s) == (1, 100, 200, 165)
    assert accounts.effective == pytest.approx(165 / 200)
    assert lost(accounts) == {"start": 10, "data": 10, "save": 8, "skipped": 6, "interrupted": 1}
    check_sum(accounts)


def test_steps_after_the_checkpoint_that_a_restart_begins_at_were_for_nothing() -> None:
    killed = [
        *STRAIGHT[:3],
        event("lost", 1, 160, 80, start=10, data=8, compute=130, save=4),  # 8 s of the step that was under way
        event("begin", 2, 190),
        event("ready", 2, 205, 50, start=15),
        event("end", 2, 300, 100, start=15, compute=90, state="finished"),
    ]
    accounts = account(killed)
    assert accounts.productive_s == 80 + 90
    assert lost(accounts) == {"start": 25, "data": 8, "save": 4, "repeated": 50, "interrupted": 8 + 5, "down": 30}
    assert accounts.wall_s == 300
    check_sum(accounts)


def test_a_checkpoint_that_was_lost_costs_its_part_of_the_time_between_two_events() -> None:
    events = [
        event("begin", 1, 0),
        event("ready", 1, 0, 0),
        event("save", 1, 100, 10, compute=100),
        event("lost", 1, 200, 20, compute=200),
        event("begin", 2, 200),
        event("ready", 2, 200, 5),
    ]
    accounts = account(events)
    assert (accounts.productive_s, accounts.lost["repeated"], accounts.steps) == (50, 150, 5)
    check_sum(accounts)


def test_a_rollback_repeats_steps_of_its_own_attempt() -> None:
    events = [
        event("begin", 1, 0),
        event("ready", 1, 0, 0),
        event("save", 1, 40, 4, compute=40),
        event("rollback", 1, 80, 4, from_step=8, compute=60, skipped=10, start=10),
        event("end", 1, 120, 8, compute=100, skipped=10, start=10, state="finished"),
    ]
    accounts = account(events)
    assert (accounts.productive_s, lost(accounts)) == (80, {"repeated": 20, "skipped": 10, "start": 10})
    check_sum(accounts)


def test_an_attempt_that_never_began_to_train_is_start_up() -> None:
    events = [
        event("begin", 1, 0),
        event("lost", 1, 90, 0),
        event("begin", 2, 100),
        event("ready", 2, 130, 0, start=30),
    ]
    accounts = account(events)
    assert (lost(accounts), accounts.attempts) == ({"start": 120, "down": 10}, 2)
    check_sum(accounts)


def test_an_attempt_without_an_end_ends_with_its_last_event() -> None:
    accounts = account([*STRAIGHT[:3], event("begin", 2, 150)])
    assert (accounts.lost["down"], accounts.lost["interrupted"]) == (50, 1)
    check_sum(accounts)


def test_the_time_after_a_run_has_finished_is_nobodys() -> None:
    accounts = account([*STRAIGHT, event("begin", 2, 10_000), event("ready", 2, 10_005, 100, start=5)])
    assert accounts.wall_s == 205
    check_sum(accounts)


def test_while_an_attempt_runs_what_it_has_computed_since_its_last_event_counts() -> None:
    accounts = account(STRAIGHT[:3])
    assert accounts.effective_at(150, computed_s=120) == pytest.approx(120 / 150)


def test_events_without_a_beginning_are_refused() -> None:
    with pytest.raises(ValueError, match=r"events.jsonl begins with 'ready'"):
        account(STRAIGHT[1:])
