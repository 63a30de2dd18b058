from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from rae_scale.data.epoch import EpochOrder
from rae_scale.data.order import derive_key, permute

SHARDS = [5, 3, 8, 0, 1, 7, 13, 4]  # 41 samples


def order(*, lanes: int = 1, shuffle_block: int = 10**6, seed: int = 7, sizes: list[int] | int = SHARDS) -> EpochOrder:
    return EpochOrder([sizes], seed, lanes=lanes, shuffle_block=shuffle_block)


def one_pass(of: EpochOrder, lane: int, epoch: int) -> list[int]:
    """The indices that a lane reads in an epoch, in order."""
    _, size = (int(each[0]) for each in of.part(np.array([0]), np.array([lane])))
    ordinals = np.arange(size) + epoch * size
    blocks, index = of.locate(np.zeros_like(ordinals), np.full_like(ordinals, lane), ordinals)
    assert set(blocks.epoch.tolist()) == {epoch}
    return index.tolist()


def shard_of(index: int) -> int:
    return int(np.searchsorted(np.cumsum(SHARDS), index, side="right"))


@pytest.mark.parametrize("lanes", [1, 2, 3, 7, 41])
@pytest.mark.parametrize("shuffle_block", [1, 4, 10, 41, 1000])
def test_every_sample_comes_once_per_epoch(lanes: int, shuffle_block: int) -> None:
    of = order(lanes=lanes, shuffle_block=shuffle_block)
    passes = [[one_pass(of, lane, epoch) for lane in range(lanes)] for epoch in range(3)]
    for parts in passes:
        assert sorted(index for part in parts for index in part) == list(range(41))
        assert {len(part) for part in parts} <= {41 // lanes, 41 // lanes + 1}
    assert passes[0] != passes[1] != passes[2]


def test_a_block_that_holds_everything_is_a_plain_shuffle_of_the_source() -> None:
    plain = [permute(offset, 41, derive_key(2, 7, 0, 1)) for offset in range(41)]
    assert one_pass(order(shuffle_block=41), 0, 1) == plain
    assert one_pass(order(shuffle_block=41, sizes=41), 0, 1) == plain
    assert one_pass(order(shuffle_block=40), 0, 1) != plain


def test_a_block_is_read_before_the_next_and_needs_few_shards() -> None:
    of = order(shuffle_block=6)
    for epoch in range(4):
        index = one_pass(of, 0, epoch)
        ordinals = np.arange(41) + 41 * epoch
        blocks = of.blocks(np.zeros_like(ordinals), np.zeros_like(ordinals), ordinals)
        assert blocks.number.tolist() == sorted(blocks.number.tolist())
        sizes = [int(size) for size in blocks.size[blocks.offset == 0]]
        assert sum(sizes) == 41 and set(sizes) <= {5, 6}
        read = 0
        for number, size in enumerate(sizes):
            needed = set(of.shards(0, 0, epoch, number).tolist())
            assert {shard_of(each) for each in index[read : read + size]} <= needed
            assert len(needed) <= 5  # with neighbours in the line, each of at least one sample, and the empty one
            read += size
        line = [shard for shard in of.line(0, epoch).shard.tolist() if SHARDS[shard]]
        firsts = [next(place for place, each in enumerate(index) if shard_of(each) == shard) for shard in line]
        assert all(later > earlier - 6 for earlier, later in pairwise(firsts))


def test_blocks_are_of_equal_size_so_that_none_is_too_small_to_replace_a_sample() -> None:
    of = order(shuffle_block=1000, sizes=[3001])
    ordinals = np.arange(3001)
    blocks = of.blocks(np.zeros_like(ordinals), np.zeros_like(ordinals), ordinals)
    assert sorted(set(blocks.size.tolist())) == [750, 751]


def test_shards_and_samples_are_in_another_order_in_every_epoch_and_seed() -> None:
    sizes = [100] * 50
    lines = {tuple(order(sizes=sizes, seed=seed).line(0, epoch).shard) for seed in (0, 1) for epoch in (0, 1)}
    assert len(lines) == 4
    first, second = (one_pass(order(sizes=sizes, shuffle_block=100), 0, epoch)[:100] for epoch in (0, 1))
    # Samples of a block are not where those of another block were, either.
    assert [each % 100 for each in first] != [each % 100 for each in second]


def test_shards_past_the_last_block_are_those_of_the_next_epoch() -> None:
    of = order(lanes=2, shuffle_block=5)
    blocks = int(of.block_count(of.part(np.array([0]), np.array([1]))[1])[0])
    assert of.shards(0, 1, 3, blocks + 1).tolist() == of.shards(0, 1, 4, 1).tolist()


def test_any_sample_can_be_located_alone_and_in_any_order() -> None:
    of = order(lanes=3, shuffle_block=4)
    ordinals = np.arange(0, 5000, 131)
    lanes = ordinals % 3
    _, together = of.locate(np.zeros_like(ordinals), lanes, ordinals)
    fresh = order(lanes=3, shuffle_block=4)
    for ordinal, lane, index in reversed(list(zip(ordinals, lanes, together.tolist(), strict=True))):
        _, alone = fresh.locate(np.array([0]), np.array([lane]), np.array([ordinal]))
        assert alone.tolist() == [index]


def test_what_is_kept_is_three_integers_per_shard_for_two_epochs() -> None:
    of = order(shuffle_block=4, sizes=[2] * 1000)
    for epoch in range(10):
        one_pass(of, 0, epoch)
    arrays = [array for line in of._lines.values() for array in (line.shard, line.end, line.shift)]
    assert sum(array.nbytes for array in arrays) == 2 * 3 * 8 * 1000


def test_a_source_with_fewer_samples_than_lanes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.lanes=42: source 0 has 41 samples"):
        order(lanes=42)


def test_the_order_of_today_is_the_order_of_tomorrow() -> None:
    """A run that was saved must resume into the same order: these numbers may never change."""
    of = order(lanes=2, shuffle_block=8)
    assert one_pass(of, 0, 0)[:10] == [3, 4, 1, 17, 2, 0, 23, 20, 21, 18]
    assert one_pass(of, 1, 1)[:10] == [20, 26, 22, 21, 24, 23, 25, 28, 33, 27]
