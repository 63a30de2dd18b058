from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from rae_scale.data.order import derive_key, permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 97, 100, 1000, 1023, 1024, 1025])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_keys_give_different_orders() -> None:
    orders = {tuple(permute(index, 50, key) for index in range(50)) for key in range(100)}
    assert len(orders) == 100


def test_every_element_lands_everywhere_equally_often() -> None:
    size, keys = 6, 12_000
    for index in (0, 5):
        counts = Counter(permute(index, size, derive_key(key)) for key in range(keys))
        # Binomial with mean 2000 and deviation 41.
        assert all(abs(counts[target] - keys / size) < 5 * 41 for target in range(size))


def test_neighbours_are_torn_apart() -> None:
    size = 100_000
    images = [permute(index, size, 7) for index in range(2000)]
    gaps = [abs(first - second) for first, second in pairwise(images)]
    assert 0.30 < sum(gaps) / len(gaps) / size < 0.37  # one third for independent positions
    assert sum(gap == 1 for gap in gaps) < 3


def test_lookup_is_immediate_in_a_huge_set() -> None:
    size = 10**12
    assert len({permute(index, size, 1) for index in range(size - 100, size)}) == 100


def test_the_order_of_today_is_the_order_of_tomorrow() -> None:
    """A run that was saved must resume into the same order: these numbers may never change."""
    assert [permute(index, 10, 42) for index in range(10)] == [4, 8, 3, 2, 9, 5, 1, 7, 0, 6]
    assert derive_key(1, 2, 3) == 9812528628958509896


def test_an_index_outside_the_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"index 5 is outside range\(5\)"):
        permute(5, 5, 0)
