"""Random choices of the data path, each a function of (seed, sample index): nothing else in a run can change them.

A sample's place in the data order, not its place on disk, is the key: the next epoch draws anew. There is no generator
whose state would depend on how many workers or ranks have drawn before.
"""

from __future__ import annotations

from enum import IntEnum

from rae_scale.data.order import derive_key

DRAW_KEY = 0xDA7A  # the order draws from keys of its own


class Draw(IntEnum):
    """What a number is used for. Uses of one sample must not share numbers.

    The values are part of what makes a run reproducible: never renumber them.
    """

    CAPTION = 0
    CROP = 1
    FLIP = 2


def uniform(seed: int, sample_index: int, draw: Draw) -> float:
    """A number in [0, 1), of 53 random bits."""
    return (derive_key(DRAW_KEY, seed, sample_index, draw) >> 11) / 2**53
