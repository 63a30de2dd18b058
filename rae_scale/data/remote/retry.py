"""Bounded retries with exponential back-off and jitter."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable
from threading import Event
from typing import TypeVar

from rae_scale.data.remote.errors import Cancelled, FetchError

T = TypeVar("T")

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0


def with_retries(action: Callable[[], T], attempts: int, key: str, closing: Event) -> T:
    """What `action` returns, tried up to `attempts` times while it raises FetchErrors that ask for it.

    key: what is fetched. With the process it seeds the jitter, so that processes that failed together do not come back
         together.
    closing: ends the wait between attempts; then Cancelled is raised.

    Raises the last FetchError, saying how often it was tried.
    """
    jitter = random.Random(zlib.crc32(f"{key}:{os.getpid()}".encode()))
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except FetchError as error:
            if not error.retry:
                raise
            if attempt == attempts:
                raise FetchError(f"{error} (tried {attempts} times)") from None
            if closing.wait(delay_s(attempt, error.retry_after, jitter.random())):
                raise Cancelled(f"{key}: the reader was closed") from None
    raise AssertionError("at least one attempt")


def delay_s(attempt: int, retry_after: float, draw: float) -> float:
    """Half to all of a delay that doubles with each attempt, or what the server asked for if that is longer."""
    delay = min(FIRST_DELAY_S * 2 ** (attempt - 1), MAX_DELAY_S) * (0.5 + 0.5 * draw)
    return max(delay, min(retry_after, MAX_DELAY_S))
