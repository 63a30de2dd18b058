from __future__ import annotations

import random
from itertools import pairwise

import pytest

from rae_scale.data.mixture import BLOCK, Location, Mixture, integer_ratios


@pytest.mark.parametrize(
    ("weights", "ratios"),
    [([1.0], (1,)), ([0.7, 0.3], (7, 3)), ([1, 3], (1, 3)), ([0.1, 0.2], (1, 2)), ([2.5, 1e-3], (2500, 1))],
)
def test_weights_are_the_decimal_numbers_they_look_like(weights: list[float], ratios: tuple[int, ...]) -> None:
    assert integer_ratios(weights) == ratios


def test_a_weight_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="must all be above 0"):
        Mixture([3, 3], [1.0, 0.0], seed=0)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 1], [0.001, 0.999], [1, 2, 3, 4, 5], [1 / 3, 2 / 3]])
def test_proportions_are_exact_at_every_block_and_do_not_drift(weights: list[float]) -> None:
    mixture = Mixture([50] * len(weights), weights, seed=1)
    counts = [0] * len(weights)
    for position in range(100 * BLOCK):
        if position % BLOCK == 0:
            assert counts == mixture.counts(position)
            exact = [position * weight / sum(weights) for weight in weights]
            assert all(abs(count - want) <= 1 for count, want in zip(counts, exact, strict=True))
        counts[mixture.locate(position).source] += 1


def test_proportions_hold_far_out() -> None:
    position = 10**15 * BLOCK
    assert Mixture([9, 9], [0.3, 0.7], seed=0).counts(position) == [position * 3 // 10, position * 7 // 10]


@pytest.mark.parametrize(("sizes", "weights"), [([10], [1.0]), ([7, 30, 11], [0.2, 0.5, 0.3])])
def test_each_sample_comes_once_per_epoch_of_its_source(sizes: list[int], weights: list[float]) -> None:
    mixture = Mixture(sizes, weights, seed=3)
    orders: dict[int, list[Location]] = {source: [] for source in range(len(sizes))}
    for position in range(20 * BLOCK):
        location = mixture.locate(position)
        orders[location.source].append(location)
    for source, size in enumerate(sizes):
        passes = [orders[source][start : start + size] for start in range(0, len(orders[source]) - size, size)]
        for epoch, locations in enumerate(passes):
            assert {location.epoch for location in locations} == {epoch}
            assert sorted(location.index for location in locations) == list(range(size))
        assert len({tuple(location.index for location in locations) for locations in passes}) > len(passes) // 2


def test_sources_are_interleaved_not_alternating() -> None:
    mixture = Mixture([1000, 1000], [1, 1], seed=0)
    sources = [mixture.locate(position).source for position in range(BLOCK * 8)]
    runs = 1 + sum(first != second for first, second in pairwise(sources))
    assert 0.4 < runs / len(sources) < 0.6


def test_any_position_can_be_asked_for_in_any_order() -> None:
    positions = list(range(10**9, 10**9 + 3 * BLOCK))
    expected = {position: Mixture([33, 44], [2, 5], seed=9).locate(position) for position in positions}
    random.Random(0).shuffle(positions)
    mixture = Mixture([33, 44], [2, 5], seed=9)
    assert {position: mixture.locate(position) for position in positions} == expected


def test_the_seed_changes_the_order() -> None:
    first, second = (Mixture([100, 100], [1, 1], seed) for seed in (0, 1))
    same = sum(first.locate(position) == second.locate(position) for position in range(500))
    assert same < 25


def test_substitutes_stay_in_the_source_and_differ() -> None:
    mixture = Mixture([1000, 1000], [1, 1], seed=0)
    for position in range(20):
        wanted = mixture.locate(position)
        substitutes = [mixture.substitute(position, attempt) for attempt in range(1, 6)]
        assert {location.source for location in substitutes} == {wanted.source}
        assert len({location.index for location in [wanted, *substitutes]}) >= 5
        assert substitutes == [mixture.substitute(position, attempt) for attempt in range(1, 6)]


def test_the_order_of_today_is_the_order_of_tomorrow() -> None:
    """A run that was saved must resume into the same order: these numbers may never change."""
    mixture = Mixture([10, 20], [1, 2], seed=42)
    indices = [(location.source, location.index) for location in map(mixture.locate, range(6))]
    assert indices == [(1, 16), (0, 5), (1, 6), (1, 17), (0, 3), (1, 1)]
    assert mixture.substitute(0, 1).index == 16
