from __future__ import annotations

from threading import Event

import pytest

from rae_scale.data.remote.errors import Cancelled, FetchError
from rae_scale.data.remote.retry import MAX_DELAY_S, delay_s, with_retries


class Waits(Event):
    """Remembers the delays in place of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.delays: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.delays.append(timeout or 0.0)
        return self.is_set()


def failing(times: int, **how: object):
    left = [times]

    def action() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise FetchError("away", **how)  # type: ignore[arg-type]
        return "here"

    return action


def test_delays_double_with_jitter_and_the_same_seed_gives_the_same() -> None:
    waits, again, other = Waits(), Waits(), Waits()
    assert with_retries(failing(5, retry=True), 6, "a", waits) == "here"
    for number, delay in enumerate(waits.delays):
        assert 0.25 * 2**number <= delay <= 0.5 * 2**number
    with_retries(failing(5, retry=True), 6, "a", again)
    with_retries(failing(5, retry=True), 6, "b", other)
    assert waits.delays == again.delays != other.delays


def test_the_last_failure_is_raised_with_the_number_of_attempts() -> None:
    waits = Waits()
    with pytest.raises(FetchError, match=r"away \(tried 3 times\)"):
        with_retries(failing(3, retry=True), 3, "a", waits)
    assert len(waits.delays) == 2
    with pytest.raises(FetchError, match=r"^away$"):
        with_retries(failing(1), 3, "a", waits)
    assert len(waits.delays) == 2


def test_what_the_server_asks_for_is_heeded_within_bounds() -> None:
    assert delay_s(1, 7.0, 0.5) == 7.0
    assert delay_s(1, 3600.0, 0.5) == delay_s(60, 0.0, 1.0) == MAX_DELAY_S


def test_closing_ends_the_wait() -> None:
    waits = Waits()
    waits.set()
    with pytest.raises(Cancelled):
        with_retries(failing(9, retry=True), 9, "a", waits)
