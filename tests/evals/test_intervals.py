from __future__ import annotations

import pytest

from rae_scale.evals.intervals import wilson


def test_wilson_equals_published_values() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.parametrize(("successes", "total"), [(1, 0), (0, 0), (5, 4), (-1, 4)])
def test_no_share_is_refused(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes of {total}"):
        wilson(successes, total)
