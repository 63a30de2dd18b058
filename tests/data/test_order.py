from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import isqrt

import numpy as np
import pytest

from rae_scale.data import order
from rae_scale.data.order import MASK, derive_key, derive_keys, integer_root, permute, permute_many


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


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 1025, 10**12, 2**53 + 1, 2**61])
def test_whole_arrays_are_permuted_as_single_elements(size: int) -> None:
    indices = sorted({0, 1 % size, size // 3, size // 2, size - 1})
    keys = [derive_key(number) for number in range(len(indices))]
    images = permute_many(np.array(indices), np.array([size]), np.array(keys, np.uint64))
    assert images.tolist() == [permute(index, size, key) for index, key in zip(indices, keys, strict=True)]


def test_hashes_too_large_to_add_to_a_digit_are_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "mix", lambda value: MASK)
    monkeypatch.setattr(order, "mix_many", lambda values: np.full_like(values, MASK))
    indices = np.array([0, 7, 899])  # in 30 x 30 digits: no divisors of 2**64, to which it would make no difference
    images = permute_many(indices, np.array([900]), np.array([0], np.uint64))
    assert images.tolist() == [permute(index, 900, 0) for index in indices.tolist()]


def test_elements_of_an_array_can_have_sizes_of_their_own() -> None:
    sizes = np.array([1, 2, 7, 64, 1000])
    images = permute_many(sizes - 1, sizes, np.array([9], np.uint64))
    assert images.tolist() == [permute(size - 1, size, 9) for size in sizes.tolist()]


def test_keys_of_arrays_are_the_keys_of_their_elements() -> None:
    parts = np.array([0, 1, -1, 2**62])
    seeds = (5, -7, 2**64 + 3)
    keys = derive_keys(*seeds, parts, parts.astype(np.uint64))
    assert keys.tolist() == [derive_key(*seeds, part, part) for part in parts.tolist()]


def test_roots_of_large_squares_are_exact() -> None:
    bases = [1, 2, 3, 2**26, 2**27 - 1, 2**31 - 1, 3_037_000_499]  # the last square below 2**63
    values = [value for base in bases for value in (base * base - 1, base * base, base * base + 1)]
    assert integer_root(np.array(values, np.uint64)).tolist() == list(map(isqrt, values))


def test_an_index_outside_the_set_is_refused_in_an_array_too() -> None:
    with pytest.raises(ValueError, match=r"index 7 is outside range\(7\)"):
        permute_many(np.array([6, 7]), np.array([7]), np.array([0], np.uint64))
