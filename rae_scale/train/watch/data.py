"""Waiting for data without being deaf to a stop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

SLICE_SECONDS = 0.5


def take(source: Iterator[T], give_up: Callable[[], bool]) -> T | None:
    """next(source), or None once `give_up()`: storage that hangs must not keep a rank from its last checkpoint.

    A thread asks for the item, since nothing can interrupt a read. After None it still does: take nothing any more.
    """
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((next(source), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=ask, name="data", daemon=True).start()
    while True:
        try:
            item, error = answers.get(timeout=SLICE_SECONDS)
        except queue.Empty:
            if give_up():
                return None
            continue
        if error is not None:
            raise error
        return item
