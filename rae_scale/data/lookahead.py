"""Which shards a worker has fetched before it needs them: the order is known, so are the shards of its next blocks."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from torch.utils.data import get_worker_info

from rae_scale.data.epoch import Blocks, EpochOrder
from rae_scale.data.mds_reader import MDSReader

Stream = tuple[int, int]  # source and lane


class Lookahead:
    """Asks the readers of one process for the shards of the block that each of its lanes is in, and of those after it.

    blocks: how many after it. The last one's shards are asked for bit by bit while the first half of the current block
            is read: the load on the storage is even, and they are there in time.

    The workers of a rank have the same lanes: each asks for its share. Sources that are read in place need nothing.
    """

    def __init__(self, order: EpochOrder, readers: Sequence[MDSReader], blocks: int) -> None:
        self._order = order
        self._readers = readers
        self._blocks = blocks
        self._fetched = np.array([reader.fetches for reader in readers])
        self._windows: dict[Stream, tuple[tuple[int, int], list[list[int]]]] = {}
        self._asked: dict[Stream, set[int]] = {}

    def advance(self, blocks: Blocks) -> None:
        """blocks: those of the positions that are read next, in ascending order."""
        if not self._fetched.any():
            return
        streams = zip(blocks.source.tolist(), blocks.lane.tolist(), strict=True)
        last = {stream: at for at, stream in enumerate(streams)}
        for (source, lane), at in last.items():
            if self._fetched[source]:
                place = int(blocks.epoch[at]), int(blocks.number[at])
                self._ask(source, lane, place, float(blocks.offset[at] / blocks.size[at]))

    def _ask(self, source: int, lane: int, place: tuple[int, int], progress: float) -> None:
        window = self._window(source, lane, place)
        last = window[-1] if self._blocks else []
        due = [shard for block in window[: self._blocks or 1] for shard in block]
        due += last[: ceil(len(last) * min(1.0, 2 * progress))]
        asked = self._asked.get((source, lane), set())
        self._asked[source, lane] = set(due)
        self._readers[source].prefetch(mine([shard for shard in due if shard not in asked]))

    def _window(self, source: int, lane: int, place: tuple[int, int]) -> list[list[int]]:
        """The shards of the current block and of those after it."""
        known, window = self._windows.get((source, lane), (None, []))
        if known != place:
            epoch, number = place
            ahead = range(number, number + self._blocks + 1)
            window = [self._order.shards(source, lane, epoch, each).tolist() for each in ahead]
            self._windows[source, lane] = (place, window)
        return window


def working_set(order: EpochOrder, readers: Sequence[MDSReader], lanes: int, blocks: int) -> int:
    """Bytes of the shards that so many lanes need at a time: their block of each source that is fetched, and `blocks`
    more. A cache of less fetches shards again and again."""
    total = 0
    for reader in readers:
        if reader.fetches:
            samples = min(len(reader), lanes * min((blocks + 1) * order.shuffle_block, len(reader) // order.lanes))
            total += int(reader.shard_bytes.sum()) * samples // len(reader)
    return total


def mine(shards: list[int]) -> list[int]:
    """This worker's share of what all workers of the rank ask for."""
    worker = get_worker_info()
    return shards if worker is None else [shard for shard in shards if shard % worker.num_workers == worker.id]
