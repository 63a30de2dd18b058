from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from rae_scale.data import lookahead
from rae_scale.data.lookahead import Lookahead, working_set
from rae_scale.data.mixture import Mixture

BLOCK = 40
SHARD = 5


class Reader:
    """Remembers what it was asked for."""

    def __init__(self, fetches: bool = True) -> None:
        self.fetches = fetches
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 64 * SHARD

    @property
    def shard_bytes(self) -> np.ndarray:
        return np.full(64, SHARD * 1000)

    def prefetch(self, shards: list[int]) -> None:
        assert self.fetches
        self.asked += shards


def mixture(lanes: int = 1, sources: int = 1) -> Mixture:
    return Mixture(
        [[SHARD] * 64] * sources, [1] * sources, 3, lanes=lanes, shuffle_block=BLOCK, global_batch_size=4 * lanes
    )


def shards_of(order: Mixture, source: int, lane: int, number: int) -> set[int]:
    return set(order.order.shards(source, lane, 0, number).tolist())


def test_shards_are_asked_for_before_they_are_read_and_never_far_ahead() -> None:
    order, reader = mixture(), Reader()
    ahead = Lookahead(order.order, [reader], 1)  # type: ignore[list-item]
    for start in range(0, 900, 4):
        located = order.locate_many(np.arange(start, start + 4))
        ahead.advance(located.blocks)
        block = start // BLOCK % 8
        epoch = start // 320
        near = {shard for each in (block, block + 1) for shard in order.order.shards(0, 0, epoch, each).tolist()}
        assert set((located.index // SHARD).tolist()) <= set(reader.asked)
        assert set(reader.asked[-4:]) <= near
        progress = start % BLOCK / BLOCK
        if progress >= 0.5:
            assert shards_of(order, 0, 0, 8 * epoch + block + 1) <= set(reader.asked[-30:])
    # A shard is asked for once per pass: blocks share no shard here, but those of two epochs may.
    assert len(reader.asked) <= 64 * 3


def test_the_next_block_is_asked_for_bit_by_bit() -> None:
    order, reader = mixture(), Reader()
    ahead = Lookahead(order.order, [reader], 1)  # type: ignore[list-item]
    asked = []
    for start in range(0, BLOCK, 4):
        ahead.advance(order.locate_many(np.arange(start, start + 4)).blocks)
        asked.append(len(reader.asked))
    assert asked[0] <= 8 + 2 and asked == sorted(asked)
    assert 8 + 3 <= asked[2] <= 8 + 6
    assert asked[5:] == [16] * 5


def test_without_blocks_ahead_only_the_current_one_is_asked_for() -> None:
    order, reader = mixture(), Reader()
    Lookahead(order.order, [reader], 0).advance(order.locate_many(np.arange(4)).blocks)  # type: ignore[list-item]
    assert set(reader.asked) == shards_of(order, 0, 0, 0)


def test_positions_across_two_blocks_count_as_in_the_second() -> None:
    order, reader = mixture(), Reader()
    blocks = order.locate_many(np.arange(BLOCK - 4, BLOCK + 4)).blocks
    Lookahead(order.order, [reader], 0).advance(blocks)  # type: ignore[list-item]
    assert set(reader.asked) == shards_of(order, 0, 0, 1)


def test_each_lane_and_source_has_blocks_of_its_own() -> None:
    order, readers = mixture(lanes=2, sources=2), [Reader(), Reader()]
    Lookahead(order.order, readers, 0).advance(order.locate_many(np.arange(8)).blocks)  # type: ignore[arg-type]
    for source, reader in enumerate(readers):
        assert set(reader.asked) == shards_of(order, source, 0, 0) | shards_of(order, source, 1, 0)


def test_sources_that_are_read_in_place_are_left_alone() -> None:
    order, readers = mixture(sources=2), [Reader(fetches=False), Reader()]
    Lookahead(order.order, readers, 1).advance(order.locate_many(np.arange(64)).blocks)  # type: ignore[arg-type]
    assert readers[0].asked == [] and readers[1].asked


def test_workers_of_a_rank_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    order, asked = mixture(), []
    for worker in range(3):
        monkeypatch.setattr(lookahead, "get_worker_info", lambda id=worker: SimpleNamespace(id=id, num_workers=3))
        reader = Reader()
        Lookahead(order.order, [reader], 0).advance(order.locate_many(np.arange(4)).blocks)  # type: ignore[list-item]
        asked += reader.asked
    assert sorted(asked) == sorted(shards_of(order, 0, 0, 0))


@pytest.mark.parametrize(
    ("lanes", "blocks", "samples"), [(1, 0, 40), (1, 1, 80), (2, 1, 160), (2, 9, 320), (1, 9, 160)]
)
def test_the_working_set_is_the_blocks_of_the_lanes_but_no_more_than_their_parts(
    lanes: int, blocks: int, samples: int
) -> None:
    order, readers = mixture(lanes=2, sources=2), [Reader(fetches=False), Reader()]
    assert working_set(order.order, readers, lanes, blocks) == samples * 1000  # type: ignore[arg-type]
