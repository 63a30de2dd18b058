"""The order of a source within one pass over it: whole shards are shuffled, then samples within blocks.

Per (source, epoch) the shards stand in a random order, and their samples one after another in a line. The line is cut
into `lanes` equal parts, each part into blocks of at most `shuffle_block` samples, and each block is shuffled. So every
sample comes once per pass, and whoever reads one lane needs the shards of one block at a time, not all of them. A
single lane with a block that holds the whole source is a plain shuffle of it.

What is held is three int64 per shard, for two passes; everything else is computed from (seed, source, epoch, lane).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rae_scale.data.order import IntArray, derive_keys, permute_many

# First parts of derived keys, so that no two uses of the seed share random numbers; those of the mixture are below 10.
EPOCH_KEY, SHARD_KEY, BLOCK_KEY = 2, 10, 11
# Lanes pass from one epoch to the next at slightly different times.
KEPT_EPOCHS = 2


@dataclass(frozen=True)
class Blocks:
    """Of each of n samples the block that it is in. All int64 `[n]`.

    number: of the block within (epoch, lane); begin, size: its place in the epoch's line; offset: of the sample within
    the block, in the order in which the block is read.
    """

    source: IntArray
    lane: IntArray
    epoch: IntArray
    number: IntArray
    begin: IntArray
    size: IntArray
    offset: IntArray


@dataclass(frozen=True)
class Line:
    """The shards of a source in the order of one epoch, int64 `[shards]` each.

    shard: their numbers; end: where each ends in the line; shift: what turns a place in the line into the sample's
    index in the source.
    """

    shard: IntArray
    end: IntArray
    shift: IntArray


class EpochOrder:
    """Where the samples of all sources stand, a pure function of (shard sizes, seed, lanes, block) in constant time.

    shard_sizes: per source the samples of its shards; a bare integer is a source of one shard.

    Raises ValueError for a source with fewer samples than lanes.
    """

    def __init__(self, shard_sizes: Sequence[npt.ArrayLike], seed: int, *, lanes: int, shuffle_block: int) -> None:
        self.shard_sizes = [np.atleast_1d(np.asarray(sizes, np.int64)) for sizes in shard_sizes]
        self.sizes = np.array([sizes.sum() for sizes in self.shard_sizes], np.int64)
        self.seed = seed
        self.lanes = lanes
        self.shuffle_block = shuffle_block
        for number, size in enumerate(self.sizes.tolist()):
            if size < lanes:
                raise ValueError(
                    f"data.lanes={lanes}: source {number} has {size} samples, not one for each lane; lower data.lanes "
                    "or leave the source out"
                )
        self._plain = (self.sizes <= shuffle_block) & (lanes == 1)
        self._lines: OrderedDict[tuple[int, int], Line] = OrderedDict()

    def locate(self, source: IntArray, lane: IntArray, ordinal: IntArray) -> tuple[Blocks, IntArray]:
        """The blocks and indices in the source of the samples that a lane takes as its `ordinal`-th of a source."""
        blocks = self.blocks(source, lane, ordinal)
        keys = derive_keys(BLOCK_KEY, self.seed, source, blocks.epoch, lane, blocks.number)
        plain = self._plain[source]
        if plain.any():
            keys = np.where(plain, derive_keys(EPOCH_KEY, self.seed, source, blocks.epoch), keys)
        return blocks, self.index_of(
            source, blocks.epoch, blocks.begin + permute_many(blocks.offset, blocks.size, keys)
        )

    def blocks(self, source: IntArray, lane: IntArray, ordinal: IntArray) -> Blocks:
        begin, size = self.part(source, lane)
        epoch, offset = np.divmod(ordinal, size)
        count = self.block_count(size)
        # Equal blocks rather than a last one of what is left: in a block of three samples nothing could be replaced.
        number = -(-count * (offset + 1) // size) - 1
        first = number * size // count
        end = (number + 1) * size // count
        return Blocks(source, lane, epoch, number, begin + first, end - first, offset - first)

    def part(self, source: IntArray, lane: IntArray) -> tuple[IntArray, IntArray]:
        """(begin, size) of the lane's part of a source's line, in samples; the same in every epoch."""
        begin = lane * self.sizes[source] // self.lanes
        return begin, (lane + 1) * self.sizes[source] // self.lanes - begin

    def block_count(self, part_size: IntArray) -> IntArray:
        return -(-part_size // self.shuffle_block)

    def index_of(self, source: IntArray, epoch: IntArray, place: IntArray) -> IntArray:
        """Indices within the sources of places in the lines of epochs."""
        index = place.copy()
        shuffled = ~self._plain[source]
        for number in np.unique(source[shuffled]).tolist():
            of_source = shuffled & (source == number)
            for turn in np.unique(epoch[of_source]).tolist():
                chosen = of_source & (epoch == turn)
                line = self.line(number, turn)
                index[chosen] += line.shift[np.searchsorted(line.end, place[chosen], side="right")]
        return index

    def shards(self, source: int, lane: int, epoch: int, number: int) -> IntArray:
        """Numbers of the shards of a block, in the order of the line. A `number` past the lane's last block goes on in
        the next epoch."""
        begin, size = (int(each[0]) for each in self.part(np.array([source]), np.array([lane])))
        count = -(-size // self.shuffle_block)
        epoch, number = epoch + number // count, number % count
        if self._plain[source]:
            return np.arange(len(self.shard_sizes[source]))
        line = self.line(source, epoch)
        first, end = begin + number * size // count, begin + (number + 1) * size // count
        begin_shard = int(np.searchsorted(line.end, first, side="right"))
        end_shard = int(np.searchsorted(line.end, end, side="left")) + 1
        return line.shard[begin_shard:end_shard]

    def line(self, source: int, epoch: int) -> Line:
        """Made once per epoch: a permutation of the shard numbers, some tens of milliseconds for 100,000 shards."""
        if (source, epoch) not in self._lines:
            while len(self._lines) >= KEPT_EPOCHS * len(self.sizes):
                self._lines.popitem(last=False)
            self._lines[source, epoch] = self._make_line(source, epoch)
        self._lines.move_to_end((source, epoch))
        return self._lines[source, epoch]

    def _make_line(self, source: int, epoch: int) -> Line:
        sizes = self.shard_sizes[source]
        count = len(sizes)
        key = derive_keys(SHARD_KEY, self.seed, source, epoch)
        shard = permute_many(np.arange(count), np.array([count]), key)
        end = np.cumsum(sizes[shard])
        shift = (np.cumsum(sizes) - sizes)[shard] - (end - sizes[shard])
        return Line(shard, end, shift)
