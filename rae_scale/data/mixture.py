"""Which sample stands at a global position: several sources in exact proportions, each in its own shuffled epochs.

The `global_batch_size` positions of a step are cut into `lanes` equal runs. Lane l of all steps is an endless stream of
its own: it deals its positions among the sources and goes through its own part of each of them (`epoch.py`). So the
order is the same for any number of ranks, while a node whose ranks have few of the lanes needs few of the shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np
import numpy.typing as npt

from rae_scale.data.epoch import Blocks, EpochOrder
from rae_scale.data.order import IntArray, derive_key, derive_keys, mix_many

# Positions are dealt to the sources in hands of this size: large enough to look random to a batch, small enough that
# any stretch of a few hundred samples has the proportions asked for.
HAND = 64
# First parts of derived keys, so that no two uses of the seed share random numbers; those of the epochs are others.
HAND_KEY, SUBSTITUTE_KEY, LANE_KEY, PHASE_KEY = 1, 3, 4, 5
# Lanes deal from different points of the same endless sequence of hands; else a source with a share of one in a
# thousand would come in all lanes at once, and in no other step.
PHASES = 2**30
# Of a bad sample's substitutes so many come from its block.
ATTEMPTS_IN_BLOCK = 12


@dataclass(frozen=True)
class Location:
    """Sample `index` of source number `source`, read in the source's pass number `epoch` over its samples."""

    source: int
    epoch: int
    index: int


@dataclass(frozen=True)
class Located:
    """Where the samples of n positions are. index: within the source, int64 `[n]`; blocks: the blocks that hold them,
    with source, lane and epoch."""

    index: IntArray
    blocks: Blocks

    def __iter__(self) -> Iterator[Location]:
        columns = (self.blocks.source, self.blocks.epoch, self.index)
        return map(Location, *(column.tolist() for column in columns))


class Mixture:
    """The infinite data order, a pure function of (sizes, weights, seed, lanes, block, position) in constant time.

    Of the first p positions of a lane, a source with share w holds w * p: exact to two samples at the end of every
    hand (to one with a single lane) and without drift. Each source is consumed without repetition: all its samples
    once, shuffled, then all again in another order.

    shard_sizes: per source the samples of its shards, or an integer for a source of one shard.
    global_batch_size: which lane a position belongs to follows from its place in the step; unused with one lane.

    Raises ValueError for weights that are not above 0, and for lanes that do not divide a step or outnumber a source.
    """

    def __init__(
        self,
        shard_sizes: Sequence[npt.ArrayLike],
        weights: Sequence[float],
        seed: int,
        *,
        shuffle_block: int,
        lanes: int = 1,
        global_batch_size: int = 1,
    ) -> None:
        if global_batch_size % lanes:
            raise ValueError(
                f"data.lanes={lanes} does not divide data.global_batch_size={global_batch_size}; choose a divisor of it"
            )
        self.shares = integer_ratios(weights)
        self.seed = seed
        self.lanes = lanes
        self.global_batch_size = global_batch_size
        self.order = EpochOrder(shard_sizes, seed, lanes=lanes, shuffle_block=shuffle_block)

    def locate_many(self, positions: IntArray) -> Located:
        """The samples at global positions >= 0, int64 `[n]`. For 2,048 of them about a millisecond."""
        blocks, index = self.order.locate(*self._deal(positions))
        return Located(index, blocks)

    def locate(self, position: int) -> Location:
        """The sample at one position; of many, `locate_many` is a hundred times faster."""
        return next(iter(self.locate_many(np.array([position]))))

    def substitute(self, position: int, attempt: int) -> Location:
        """What replaces an unusable sample at `position`, again a pure function.

        The first attempts take another sample of its block, whose shards are at hand. Should all of those be bad (a
        shard can be larger than a block), later ones take any of the lane's part of the source.
        """
        blocks = self.order.blocks(*self._deal(np.array([position])))
        begin, size = blocks.begin, blocks.size
        if attempt > ATTEMPTS_IN_BLOCK:
            begin, size = self.order.part(blocks.source, blocks.lane)
        place = begin + derive_key(SUBSTITUTE_KEY, self.seed, position, attempt) % int(size[0])
        index = self.order.index_of(blocks.source, blocks.epoch, place)
        return Location(int(blocks.source[0]), int(blocks.epoch[0]), int(index[0]))

    def counts(self, position: int, lane: int = 0) -> list[int]:
        """How many of the first `position` positions of a lane belong to each source (`position` a multiple of HAND).

        Each source takes its rounded share of what those before it left over. Such a chain never decreases with
        `position`, which rounding every share on its own would not guarantee.
        """
        phase = self._phase(lane)
        taken = self._counts(phase + position)
        return [count - before for count, before in zip(taken, self._counts(phase), strict=True)] if phase else taken

    def _counts(self, position: int) -> list[int]:
        counts = []
        shares_left = sum(self.shares)
        for share in self.shares:
            taken = (2 * position * share + shares_left) // (2 * shares_left)
            counts.append(taken)
            position -= taken
            shares_left -= share
        return counts

    def _phase(self, lane: int) -> int:
        return HAND * (derive_key(PHASE_KEY, self.seed, lane) % PHASES) if self.lanes > 1 else 0

    def _deal(self, positions: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Source and lane of positions, and how many earlier positions of the lane have the same source."""
        run = self.global_batch_size // self.lanes
        step, place = np.divmod(positions, self.global_batch_size)
        lane, place = np.divmod(place, run)
        number, slot = np.divmod(step * run + place, HAND)
        hands, which = np.unique(number * self.lanes + lane, return_inverse=True)
        number, of_lane = np.divmod(hands, self.lanes)
        source, ordinal = self._deal_hands(of_lane, number)
        return source[which, slot], lane, ordinal[which, slot]

    def _deal_hands(self, lane: IntArray, number: IntArray) -> tuple[IntArray, IntArray]:
        """Source and ordinal of each position of hands `[n]`: two arrays `[n, HAND]`."""
        ends = [(each * HAND, of_lane) for each, of_lane in zip(number.tolist(), lane.tolist(), strict=True)]
        begin = np.array([self.counts(position, of_lane) for position, of_lane in ends], np.int64)
        end = np.array([self.counts(position + HAND, of_lane) for position, of_lane in ends], np.int64)
        # Cards sorted by source: card c is of the first source that, with those before it, has more than c.
        cards_up_to = np.cumsum(end - begin, axis=1)
        card = np.arange(HAND)
        cards = (cards_up_to[:, :, None] <= card).sum(axis=1)
        first_card = cards_up_to - (end - begin)
        ordinals = np.take_along_axis(begin - first_card, cards, axis=1) + card
        # A random number for each slot, in whose order the slots get the cards; but those of a source in its order.
        seed = derive_keys(LANE_KEY, self.seed, lane) if self.lanes > 1 else self.seed
        keys = derive_keys(HAND_KEY, seed, number)
        source = np.take_along_axis(cards, mix_many(keys[:, None] ^ card.astype(np.uint64)).argsort(axis=1), axis=1)
        ordinal = np.empty_like(ordinals)
        np.put_along_axis(ordinal, source.argsort(axis=1, kind="stable"), ordinals, axis=1)
        return source, ordinal


def integer_ratios(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as integers with the same ratios, taken as the decimal numbers that the user wrote (0.1 is 1/10)."""
    fractions = [Fraction(str(weight)) for weight in weights]
    if any(fraction <= 0 for fraction in fractions):
        raise ValueError(f"data.sources: weights {list(weights)} must all be above 0; remove a source to leave it out")
    scale = lcm(*(fraction.denominator for fraction in fractions))
    return tuple(int(fraction * scale) for fraction in fractions)
