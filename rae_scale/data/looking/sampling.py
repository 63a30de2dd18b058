"""Which samples of a large data set to look at: evenly spaced, or at random, from all shards or from a few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.order import derive_key, permute
from rae_scale.data.record import BadSample
from rae_scale.data.sources import Item

SHARD_KEY, SAMPLE_KEY = 1, 2

Sizes = Sequence[int] | np.ndarray
"""Samples of each shard."""


def even_shards(sizes: Sizes, most: int | None) -> np.ndarray:
    """Numbers of at most `most` shards, evenly spaced; all of them for None."""
    count = len(sizes) if most is None else min(most, len(sizes))
    return np.arange(count) * len(sizes) // max(count, 1)


def random_shards(sizes: Sizes, most: int | None, seed: int) -> np.ndarray:
    """Numbers of at most `most` shards, chosen by `seed`; all of them for None."""
    count = len(sizes) if most is None else min(most, len(sizes))
    return np.array([permute(number, len(sizes), derive_key(SHARD_KEY, seed)) for number in range(count)], dtype=int)


def even_samples(sizes: Sizes, count: int | None, shards: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(shard number, global sample indexes) of `count` samples, evenly spaced over `shards`; all of theirs for None."""
    taken = np.asarray(sizes, dtype=np.int64)[shards]
    total = int(taken.sum())
    ends = np.cumsum(taken)
    starts = np.cumsum(sizes) - np.asarray(sizes)
    count = total if count is None else min(count, total)
    for number, shard in enumerate(shards):
        # Of the places p in [ends - taken, ends), those that some i * total // count hits.
        first = -(-(int(ends[number]) - int(taken[number])) * count // total) if total else 0
        last = -(-int(ends[number]) * count // total) if total else 0
        places = np.arange(first, last, dtype=np.int64) * total // max(count, 1)
        if len(places):
            yield int(shard), places - (ends[number] - taken[number]) + starts[shard]


def random_samples(sizes: Sizes, count: int, shards: np.ndarray, seed: int) -> list[int]:
    """Global indexes of `count` different samples of `shards`, chosen by `seed`; a larger `count` only adds some."""
    taken = np.asarray(sizes, dtype=np.int64)[shards]
    total = int(taken.sum())
    ends = np.cumsum(taken)
    starts = np.cumsum(sizes) - np.asarray(sizes)
    chosen = []
    for number in range(min(count, total)):
        place = permute(number, total, derive_key(SAMPLE_KEY, seed))
        at = int(np.searchsorted(ends, place, side="right"))
        chosen.append(int(starts[shards[at]] + place - (ends[at] - taken[at])))
    return chosen


def read_item(reader: MDSReader, index: int) -> Item:
    """Sample `index` as the item of an input file: with the reason where it cannot be read."""
    try:
        sample = reader[index]
    except BadSample as problem:
        return Item(str(index), problem=problem)
    return Item(sample.key, sample, "conversations" if sample.turns else "captions")
