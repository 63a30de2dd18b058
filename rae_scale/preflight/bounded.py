"""Waiting for something no longer than so long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
NAME = "preflight: "


class Stuck(TimeoutError):
    """Something did not end in time. Its thread may never end."""


def within(seconds: float, what: str, action: Callable[[], T]) -> T:
    """What `action` returns or raises, if it ends in time.

    In a thread of its own, since neither a dead file server nor a collective that waits for a dead rank can be
    interrupted.

    Raises:
        Stuck: it did not.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"{NAME}{what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Stuck(f"{what} did not end within {seconds:g} s")
    if errors:
        raise errors[0]
    return results[0]


def any_stuck() -> bool:
    """Whether a thread of `within` still runs: it may hold up the end of the process, which `os._exit` does not wait
    for."""
    return any(thread.name.startswith(NAME) for thread in threading.enumerate())
