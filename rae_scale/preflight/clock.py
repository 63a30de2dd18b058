"""How far the clocks of machines are apart, measured through the store."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rae_scale.preflight.board import Board
from rae_scale.preflight.finding import Finding, Status

ROUNDS = 3
ANSWER_SECONDS = 5.0
WARN_SECONDS, FAIL_SECONDS = 0.5, 5.0
"""Heartbeats and lock files are judged by the time that another machine wrote."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Offset:
    """seconds: that a clock is ahead of rank 0's. uncertainty: half the shortest round trip."""

    seconds: float
    uncertainty: float


def ask(board: Board, leaders: Sequence[int], clock: Clock = time.time) -> dict[int, Offset]:
    """On rank 0: the offset of each of `leaders`, which call `answer`; of those that do answer.

    A round is one way there and one back, and is taken to be as long both ways; the shortest of a few errs least.
    """
    offsets = {0: Offset(0.0, 0.0)}
    for leader in leaders:
        rounds = []
        for number in range(ROUNDS):
            asked = clock()
            board.write(f"clock/{leader}/{number}/asked", asked)
            try:
                told = board.read(f"clock/{leader}/{number}/told", float, ANSWER_SECONDS)
            except TimeoutError:
                break
            answered = clock()
            rounds.append(Offset(told - (asked + answered) / 2, (answered - asked) / 2))
        if rounds:
            offsets[leader] = min(rounds, key=lambda offset: offset.uncertainty)
    return offsets


def answer(board: Board, rank: int, seconds: float, clock: Clock = time.time) -> None:
    """On the first rank of each other machine. seconds: until the first question."""
    for number in range(ROUNDS):
        board.wait(f"clock/{rank}/{number}/asked", seconds if number == 0 else ANSWER_SECONDS)
        board.write(f"clock/{rank}/{number}/told", clock())


def judge_clocks(offsets: Mapping[int, Offset], machines: Sequence[Sequence[int]]) -> list[Finding]:
    """By the middle of all clocks, so that rank 0's may be the wrong one; of two clocks rank 0's counts.

    machines: the ranks of each, the first of which was asked.
    """
    seconds = [offset.seconds for offset in offsets.values()]
    middle = min(statistics.median_low(seconds), statistics.median_high(seconds), key=abs)
    findings = []
    for ranks in machines:
        offset = offsets.get(ranks[0])
        if offset is None:
            text = f"no answer within {ANSWER_SECONDS:.0f} s"
            findings.append(Finding("clock", "warn", text, "its time is not known", "", tuple(ranks)))
            continue
        skew = offset.seconds - middle
        certain = abs(skew) - offset.uncertainty
        status: Status = "ok" if certain <= WARN_SECONDS else "warn" if certain <= FAIL_SECONDS else "fail"
        if status == "ok":
            findings.append(Finding("clock", "ok", f"within {WARN_SECONDS} s", ranks=tuple(ranks)))
            continue
        findings.append(
            Finding(
                "clock",
                status,
                f"{abs(skew):.2f} s {'ahead of' if skew > 0 else 'behind'} the others (+- {offset.uncertainty:.3f} s)",
                "heartbeats from here look stale or from the future, and logs cannot be put in order",
                "synchronise the clock (chronyc makestep, or systemctl restart systemd-timesyncd)",
                tuple(ranks),
            )
        )
    return findings
