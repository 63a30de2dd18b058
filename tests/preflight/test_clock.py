"""Clocks that differ are found, whatever the way through the store takes."""

from __future__ import annotations

import time

from rae_scale.preflight.clock import Offset, answer, ask, judge_clocks
from tests.preflight.boards import Boards
from tests.preflight.made_up import bad, only

MACHINES = [[0, 1], [2, 3], [4, 5]]


def test_offsets_are_measured() -> None:
    with Boards() as boards:
        offsets, _, _ = boards.run(
            [
                lambda board: ask(board, [2, 4]),
                lambda board: answer(board, 2, 20),
                lambda board: answer(board, 4, 20, lambda: time.time() - 30),
            ]
        )
    assert offsets is not None
    assert abs(offsets[2].seconds) <= offsets[2].uncertainty + 0.001
    assert abs(offsets[4].seconds + 30) <= offsets[4].uncertainty + 0.001
    assert offsets[4].uncertainty < 5


def offsets(*seconds: float) -> dict[int, Offset]:
    return {2 * number: Offset(value, 0.001) for number, value in enumerate(seconds)}


def test_small_offsets_are_well() -> None:
    assert not bad(judge_clocks(offsets(0, 0.3, -0.1), MACHINES))


def test_what_is_not_certain_is_no_complaint() -> None:
    # A busy machine answers late.
    assert not bad(judge_clocks({0: Offset(0, 0), 2: Offset(3, 2.6), 4: Offset(0, 0)}, MACHINES))


def test_a_wrong_clock_is_named() -> None:
    finding = only(judge_clocks(offsets(0, 0.1, 30), MACHINES))
    assert (finding.check, finding.status, finding.ranks) == ("clock", "fail", (4, 5))
    assert "29.90 s ahead" in finding.value or "30.00 s ahead" in finding.value
    assert only(judge_clocks(offsets(0, -2, 0), MACHINES)).status == "warn"


def test_rank_0_may_be_the_wrong_one() -> None:
    assert only(judge_clocks(offsets(0, 30, 30), MACHINES)).ranks == (0, 1)


def test_of_two_clocks_rank_0_counts() -> None:
    assert only(judge_clocks(offsets(0, -30), MACHINES[:2])).ranks == (2, 3)


def test_no_answer() -> None:
    assert only(judge_clocks(offsets(0, 0.1), MACHINES)).ranks == (4, 5)
