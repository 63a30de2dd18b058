from __future__ import annotations

import pytest


class FakeClock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock_time() -> FakeClock:
    return FakeClock()
