from __future__ import annotations

import random

import pytest

from rae_scale.data.looking.distribution import Distribution, is_logarithmic


def distribution(values, step: float = 1) -> Distribution:
    result = Distribution(step)
    for value in values:
        result.add(value)
    return result


def test_quantiles_are_values_of_the_data() -> None:
    found = distribution([5, 1, 1, 9])
    assert [found.quantile(share) for share in (0.0, 0.5, 0.75, 1.0)] == [1, 1, 5, 9]
    assert (len(found), found.mean, found.least, found.most) == (4, 4.0, 1, 9)


def test_parts_add_up_to_the_whole() -> None:
    values = [random.Random(3).randrange(10_000) for _ in range(500)]
    parts = distribution(values[:123], step=64)
    parts.merge(distribution(values[123:], step=64))
    assert parts.summary() == distribution(values, step=64).summary()


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [(range(100, 200), False), ([0, 0, 1, 50, 9000], True), ([3, 70_000, 12], True), ([0.07, 0.5, 1.5], False)],
)
def test_a_histogram_holds_every_value_once(values, logarithmic: bool) -> None:
    values = list(values)
    edges, counts = distribution(values, step=0.01 if min(values) < 1 < max(values) < 2 else 1).histogram(bins=10)
    assert sum(counts) == len(values)
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == (min(values), max(values))
    assert is_logarithmic(edges) == logarithmic
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        inside = sum(left <= value < right or value == right == edges[-1] for value in values)
        assert abs(inside - count) <= 1  # a value on an edge may be rounded to either side of it


def test_coarse_steps_keep_the_extremes() -> None:
    found = distribution([1000, 5000, 5001], step=1024)
    assert len(found.counts) == 2
    assert (found.least, found.most, found.quantile(0.0), found.quantile(1.0)) == (1000, 5001, 1024, 5001)


def test_one_value_and_none() -> None:
    assert distribution([7, 7]).histogram() == ([7, 7], [2])
    assert Distribution().summary() is None
