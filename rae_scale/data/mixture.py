"""Which sample stands at a global position: several sources in exact proportions, each in its own shuffled epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

from rae_scale.data.order import derive_key, mix, permute

# Positions are dealt to the sources in blocks of this size: large enough to look random to a batch, small enough that
# any stretch of a few hundred samples has the proportions asked for.
BLOCK = 64
# First parts of derived keys, so that no two uses of the seed share random numbers.
BLOCK_KEY, EPOCH_KEY, SUBSTITUTE_KEY = 1, 2, 3


@dataclass(frozen=True)
class Location:
    """Sample `index` of source number `source`, read in the source's pass number `epoch` over its samples."""

    source: int
    epoch: int
    index: int


class Mixture:
    """The infinite data order, a pure function of (sizes, weights, seed, position) in constant time.

    A source with share w holds w * p of the first p positions, exact to one sample per source at every block end and
    without drift. Each source is consumed without repetition: all its samples once, shuffled, then all again in
    another order.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sizes = tuple(sizes)
        self.shares = integer_ratios(weights)
        self.seed = seed
        self._block: tuple[int, list[tuple[int, int]]] = (-1, [])

    def locate(self, position: int) -> Location:
        """The sample at global `position` >= 0."""
        source, ordinal = self._deal(position)
        epoch, offset = divmod(ordinal, self.sizes[source])
        index = permute(offset, self.sizes[source], derive_key(EPOCH_KEY, self.seed, source, epoch))
        return Location(source, epoch, index)

    def substitute(self, position: int, attempt: int) -> Location:
        """What replaces an unusable sample at `position`: another one of its source, again a pure function."""
        wanted = self.locate(position)
        index = derive_key(SUBSTITUTE_KEY, self.seed, position, attempt) % self.sizes[wanted.source]
        return Location(wanted.source, wanted.epoch, index)

    def _deal(self, position: int) -> tuple[int, int]:
        """The source of a position and how many earlier positions have the same source."""
        number, offset = divmod(position, BLOCK)
        if self._block[0] != number:  # positions are asked for in runs: keep the last block
            self._block = (number, self._deal_block(number))
        return self._block[1][offset]

    def _deal_block(self, number: int) -> list[tuple[int, int]]:
        counts = self.counts(number * BLOCK)
        ends = self.counts((number + 1) * BLOCK)
        cards = [source for source, count in enumerate(counts) for _ in range(ends[source] - count)]
        key = derive_key(BLOCK_KEY, self.seed, number)
        dealt = []
        for slot in sorted(range(BLOCK), key=lambda slot: mix(key ^ slot)):
            source = cards[slot]
            dealt.append((source, counts[source]))
            counts[source] += 1
        return dealt

    def counts(self, position: int) -> list[int]:
        """How many of the first `position` positions belong to each source (`position` a multiple of BLOCK).

        Each source takes its rounded share of what those before it left over. Such a chain never decreases with
        `position`, which rounding every share on its own would not guarantee.
        """
        counts = []
        shares_left = sum(self.shares)
        for share in self.shares:
            taken = (2 * position * share + shares_left) // (2 * shares_left)
            counts.append(taken)
            position -= taken
            shares_left -= share
        return counts


def integer_ratios(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as integers with the same ratios, taken as the decimal numbers that the user wrote (0.1 is 1/10)."""
    fractions = [Fraction(str(weight)) for weight in weights]
    if any(fraction <= 0 for fraction in fractions):
        raise ValueError(f"data.sources: weights {list(weights)} must all be above 0; remove a source to leave it out")
    scale = lcm(*(fraction.denominator for fraction in fractions))
    return tuple(int(fraction * scale) for fraction in fractions)
