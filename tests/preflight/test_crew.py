"""An order comes back from every rank, whatever happens to some of them."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from rae_scale.preflight.board import Board
from rae_scale.preflight.bounded import Stuck, any_stuck, within
from rae_scale.preflight.crew import END, Crew
from tests.preflight.boards import Boards


def crew(board: Board, rank: int, action: Any) -> Crew:
    return Crew(board, rank, 3, {"double": action, END: lambda _: None})


def double(number: int) -> int:
    return 2 * number


def fail(_: int) -> int:
    raise OSError(28, "No space left on device")


def test_answers_and_problems_by_rank() -> None:
    def lead(board: Board) -> Any:
        own = crew(board, 0, double)
        answers = own.order("double", int, 21, seconds=20)
        own.dismiss(False)
        return answers

    with Boards() as boards:
        answers, first, second = boards.run(
            [lead, lambda board: crew(board, 1, double).follow(), lambda board: crew(board, 2, fail).follow()]
        )
    assert answers.values == {0: 42, 1: 42}
    assert answers.problems == {2: "[Errno 28] No space left on device"}
    assert (first, second) == (False, False), "all ranks end as rank 0 says"


def test_a_rank_that_hangs_and_one_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rae_scale.preflight.crew.FAREWELL", 0.5)
    release = threading.Event()

    def hang(_: int) -> None:
        release.wait(60)

    def lead(board: Board) -> Any:
        own = crew(board, 0, double)
        answers = own.order("double", int, 1, seconds=2)
        own.dismiss(True)
        return answers

    started = time.monotonic()
    with Boards() as boards:
        # Nobody is rank 2.
        answers, success = boards.run([lead, lambda board: crew(board, 1, hang).follow()])
    assert time.monotonic() - started < 40
    assert answers.problems[1] == "double did not end within 2 s"
    assert "nothing was heard" in answers.problems[2]
    assert success
    assert any_stuck()
    release.set()


def test_waiting_ends_where_rank_0_does() -> None:
    with Boards() as boards:
        board = boards.board()
        boards.close()
        with pytest.raises(ConnectionError, match="rank 0 has ended"):
            crew(board, 1, double).follow()


def test_within() -> None:
    assert within(5, "this", lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, "this", lambda: 1 / 0)
    release = threading.Event()
    with pytest.raises(Stuck, match="that did not end"):
        within(0.05, "that", lambda: release.wait(60))
    release.set()
