from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from rae_scale.data.mixture import ATTEMPTS_IN_BLOCK, HAND, Mixture, integer_ratios


def mixture(sizes: list[Any], weights: list[float], seed: int, *, shuffle_block: int = 10**6, **lanes: int) -> Mixture:
    return Mixture(sizes, weights, seed, shuffle_block=shuffle_block, **lanes)


def sources_of(order: Mixture, positions: range) -> np.ndarray:
    return order.locate_many(np.array(positions)).blocks.source


@pytest.mark.parametrize(
    ("weights", "ratios"),
    [([1.0], (1,)), ([0.7, 0.3], (7, 3)), ([1, 3], (1, 3)), ([0.1, 0.2], (1, 2)), ([2.5, 1e-3], (2500, 1))],
)
def test_weights_are_the_decimal_numbers_they_look_like(weights: list[float], ratios: tuple[int, ...]) -> None:
    assert integer_ratios(weights) == ratios


def test_a_weight_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="must all be above 0"):
        mixture([3, 3], [1.0, 0.0], seed=0)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 1], [0.001, 0.999], [1, 2, 3, 4, 5], [1 / 3, 2 / 3]])
def test_proportions_are_exact_at_every_hand_and_do_not_drift(weights: list[float]) -> None:
    order = mixture([50] * len(weights), weights, seed=1)
    sources = sources_of(order, range(100 * HAND))
    for hand in range(100):
        counts = np.bincount(sources[: hand * HAND], minlength=len(weights))
        assert counts.tolist() == order.counts(hand * HAND)
        assert np.all(np.abs(counts - hand * HAND * np.array(weights) / sum(weights)) <= 1)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.001, 0.999], [1, 2, 3, 4, 5]])
def test_proportions_are_exact_in_every_lane_and_do_not_drift(weights: list[float]) -> None:
    order = mixture([5000] * len(weights), weights, seed=1, lanes=4, global_batch_size=4 * HAND, shuffle_block=100)
    sources = sources_of(order, range(50 * 4 * HAND)).reshape(50, 4, HAND)
    shares = np.array(weights) / sum(weights)
    for step in range(50):
        counts = np.array([np.bincount(sources[:step, lane].ravel(), minlength=len(weights)) for lane in range(4)])
        assert np.all(np.abs(counts - step * HAND * shares) <= 2)
    far = 10**15 * HAND
    assert all(abs(order.counts(far, lane)[0] - far * shares[0]) < 3 for lane in range(4))


def test_a_rare_source_does_not_come_in_all_lanes_at_once() -> None:
    order = mixture([5000, 5000], [1, 500], seed=1, lanes=32, global_batch_size=32 * HAND)
    sources = sources_of(order, range(40 * 32 * HAND)).reshape(40, 32 * HAND)
    per_step = (sources == 0).sum(axis=1)  # 4.1 on average
    assert per_step.max() <= 12 and abs(per_step.sum() - 40 * 32 * HAND / 501) <= 32


def test_proportions_hold_far_out() -> None:
    position = 10**15 * HAND
    assert mixture([9, 9], [0.3, 0.7], seed=0).counts(position) == [position * 3 // 10, position * 7 // 10]


@pytest.mark.parametrize(("sizes", "weights"), [([10], [1.0]), ([7, 30, 11], [0.2, 0.5, 0.3])])
@pytest.mark.parametrize("lanes", [1, 3])
def test_each_sample_comes_once_per_epoch_of_its_source(sizes: list[int], weights: list[float], lanes: int) -> None:
    order = mixture(sizes, weights, seed=3, lanes=lanes, global_batch_size=12, shuffle_block=4)
    locations = list(order.locate_many(np.arange(12 * HAND * lanes)))
    for source, size in enumerate(sizes):
        of_source = [location for location in locations if location.source == source]
        last_of_lanes = [location.epoch for location in of_source[-12 * lanes :]]
        assert min(last_of_lanes) >= 3
        for epoch in range(min(last_of_lanes)):  # all lanes are through with these
            assert sorted(each.index for each in of_source if each.epoch == epoch) == list(range(size))


def test_sources_are_interleaved_not_alternating() -> None:
    sources = sources_of(mixture([1000, 1000], [1, 1], seed=0), range(HAND * 8))
    runs = 1 + sum(first != second for first, second in pairwise(sources))
    assert 0.4 < runs / len(sources) < 0.6


@pytest.mark.parametrize("lanes", [1, 4])
def test_any_position_can_be_asked_for_in_any_order(lanes: int) -> None:
    settings = {"lanes": lanes, "global_batch_size": 16, "shuffle_block": 10}
    positions = list(range(10**9, 10**9 + 3 * HAND))
    together = list(mixture([33, 44], [2, 5], 9, **settings).locate_many(np.array(positions)))
    expected = dict(zip(positions, together, strict=True))
    random.Random(0).shuffle(positions)
    again = mixture([33, 44], [2, 5], 9, **settings)
    assert list(again.locate_many(np.array(positions))) == [expected[position] for position in positions]
    assert [again.locate(position) for position in positions[:9]] == [expected[each] for each in positions[:9]]


def test_lanes_are_runs_of_each_step_with_parts_of_their_own() -> None:
    order = mixture([[40] * 10], [1], 0, lanes=4, global_batch_size=20, shuffle_block=50)
    located = order.locate_many(np.arange(400))
    assert located.blocks.lane.tolist() == [position % 20 // 5 for position in range(400)]
    assert sorted(located.index.tolist()) == list(range(400))
    for lane in range(4):
        shards = np.unique(located.index[located.blocks.lane == lane] // 40)
        assert len(shards) <= 4  # 100 samples of shards of 40


def test_the_seed_changes_the_order() -> None:
    first, second = (list(mixture([100, 100], [1, 1], seed).locate_many(np.arange(500))) for seed in (0, 1))
    assert sum(one == other for one, other in zip(first, second, strict=True)) < 25


def test_substitutes_stay_in_the_source_and_differ() -> None:
    order = mixture([1000, 1000], [1, 1], seed=0)
    for position in range(8):
        wanted = order.locate(position)
        substitutes = [order.substitute(position, attempt) for attempt in range(1, 6)]
        assert {location.source for location in substitutes} == {wanted.source}
        assert len({location.index for location in [wanted, *substitutes]}) >= 5
        assert substitutes == [order.substitute(position, attempt) for attempt in range(1, 6)]


def test_substitutes_come_from_the_block_and_only_the_last_ones_from_elsewhere_in_the_lane() -> None:
    order = mixture([[50] * 40], [1], 0, lanes=2, global_batch_size=20, shuffle_block=100)
    located = order.locate_many(np.arange(2000))
    block = list(zip(located.blocks.lane.tolist(), located.blocks.number.tolist(), strict=True))
    of = dict(zip(located.index.tolist(), block, strict=True))
    for position in (0, 11, 1234):
        near = [of[order.substitute(position, attempt).index] for attempt in range(1, ATTEMPTS_IN_BLOCK + 1)]
        assert set(near) == {block[position]}
        far = [of[order.substitute(position, attempt).index] for attempt in range(ATTEMPTS_IN_BLOCK + 1, 60)]
        assert {lane for lane, _ in far} == {block[position][0]} and len(set(far)) == 10


def test_lanes_that_do_not_divide_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data.lanes=3 does not divide data.global_batch_size=16"):
        mixture([100], [1], 0, lanes=3, global_batch_size=16)


def test_the_order_of_today_is_the_order_of_tomorrow() -> None:
    """A run that was saved must resume into the same order: these numbers may never change."""
    order = mixture([10, 20], [1, 2], seed=42)
    indices = [(location.source, location.index) for location in map(order.locate, range(6))]
    assert indices == [(1, 16), (0, 5), (1, 6), (1, 17), (0, 3), (1, 1)]
    assert order.substitute(0, 1).index == 16
    lanes = mixture([[10] * 5, [10] * 9], [1, 2], seed=42, lanes=2, global_batch_size=8, shuffle_block=20)
    assert [(location.source, location.index) for location in lanes.locate_many(np.arange(8))] == [
        (1, 19),
        (0, 0),
        (1, 73),
        (0, 38),
        (0, 42),
        (0, 43),
        (0, 40),
        (1, 39),
    ]
    assert lanes.substitute(5, 1).index == 26
