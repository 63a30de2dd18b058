from __future__ import annotations

import numpy as np
import pytest

from rae_scale.data.looking.sampling import even_samples, even_shards, random_samples, random_shards

SIZES = [3, 0, 5, 2, 10]


@pytest.mark.parametrize("count", [1, 4, 7, 19, 20, 500])
def test_samples_are_evenly_spaced_over_all_shards(count: int) -> None:
    chosen = list(even_samples(SIZES, count, even_shards(SIZES, None)))
    indexes = [int(index) for _, places in chosen for index in places]
    kept = min(count, 20)
    assert indexes == [number * 20 // kept for number in range(kept)]
    starts = np.cumsum([0, *SIZES])
    assert all(starts[shard] <= index < starts[shard + 1] for shard, places in chosen for index in places)


def test_all_samples_without_a_count() -> None:
    assert [int(i) for _, places in even_samples(SIZES, None, even_shards(SIZES, None)) for i in places] == list(
        range(20)
    )


def test_few_shards_are_opened_when_few_are_allowed() -> None:
    shards = even_shards(SIZES, 2)
    assert shards.tolist() == [0, 2]
    assert [int(index) for _, places in even_samples(SIZES, 4, shards) for index in places] == [0, 2, 4, 6]
    assert len(random_shards(SIZES, 3, seed=1)) == len(set(random_shards(SIZES, 3, seed=1).tolist())) == 3


def test_random_samples_are_different_ones_by_seed() -> None:
    every = random_shards(SIZES, None, seed=5)
    assert sorted(random_samples(SIZES, 99, every, seed=5)) == list(range(20))
    assert random_samples(SIZES, 6, every, seed=5) == random_samples(SIZES, 20, every, seed=5)[:6]
    assert random_samples(SIZES, 20, random_shards(SIZES, None, seed=6), seed=6) != random_samples(SIZES, 20, every, 5)
    assert set(random_samples(SIZES, 20, np.array([2, 3]), seed=5)) == set(range(3, 10))


def test_an_empty_data_set_has_no_samples() -> None:
    assert list(even_samples([], 10, even_shards([], None))) == []
    assert random_samples([], 10, random_shards([], None, seed=0), seed=0) == []
