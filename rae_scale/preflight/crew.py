"""Rank 0 gives orders, and every rank carries each of them out: nobody waits for a rank that has failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rae_scale.preflight.board import Board, first_line
from rae_scale.preflight.bounded import within

END = "end"
PATIENCE = 600.0
"""Seconds that a rank waits for the next order: longer than any takes the slowest rank. If rank 0 dies, it hears of it
at once."""
FAREWELL = 5.0

Action = Callable[[Any], Any]


@dataclass(frozen=True)
class Order:
    """What to do, with what, and within how many seconds."""

    name: str
    argument: Any
    seconds: float


@dataclass(frozen=True)
class Answers:
    """What came of an order, by rank: values, and what went wrong where there is none."""

    values: Mapping[int, Any]
    problems: Mapping[int, str]


class Crew:
    """The ranks of a run as rank 0 commands them, and as each other one obeys.

    actions: by the name of an order, what a rank does with its argument. board: None if there is one rank.
    """

    def __init__(self, board: Board | None, rank: int, world_size: int, actions: Mapping[str, Action]) -> None:
        self._board = board
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._actions = actions
        self._count = 0

    def order(self, name: str, kind: Any, argument: Any = None, *, seconds: float) -> Answers:
        """On rank 0: let every rank do it, this one too. kind: the type of what they return."""
        deadline = time.monotonic() + seconds
        if self._board is not None:
            self._board.write(f"order/{self._count}", Order(name, argument, seconds))
        problem, value = self._obey(Order(name, argument, seconds))
        answers: dict[int, tuple[str, Any]] = {self._rank: (problem, value)}
        if self._board is not None:
            names = {other: f"answer/{self._count}/{other}" for other in self._others}
            # A little longer than they try, to hear that they gave up.
            left = deadline - time.monotonic() + FAREWELL
            answers |= self._board.read_all(names, tuple[str, kind | None], left)  # type: ignore[arg-type]
        self._count += 1
        silence = f"nothing was heard of it for {seconds:g} s"
        silent = {other: silence for other in self._others if other not in answers}
        problems = {rank: problem for rank, (problem, _) in answers.items() if problem}
        return Answers(
            {rank: value for rank, (problem, value) in sorted(answers.items()) if not problem},
            dict(sorted((problems | silent).items())),
        )

    def dismiss(self, success: bool) -> None:
        """On rank 0, at last: let the others go, and wait until they have heard it."""
        self.order(END, type(None), success, seconds=FAREWELL)

    def follow(self) -> bool:
        """On another rank: carry out what is ordered until the end. Returns the success that rank 0 tells.

        Raises:
            TimeoutError, ConnectionError: rank 0 orders nothing more.
        """
        assert self._board is not None
        while True:
            order = self._board.read(f"order/{self._count}", Order, PATIENCE)
            answer = self._obey(order)
            self._board.write(f"answer/{self._count}/{self._rank}", answer)
            self._count += 1
            if order.name == END:
                return bool(order.argument)

    def _obey(self, order: Order) -> tuple[str, Any]:
        """(what went wrong, what came of it)."""
        try:
            return "", within(order.seconds, order.name, lambda: self._actions[order.name](order.argument))
        except Exception as error:  # whatever it is, rank 0 reports it
            return first_line(error), None
