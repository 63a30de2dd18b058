"""A shuffle that is a function: where element `i` goes is computed, no list of indices is ever held.

Two consequences carry the data pipeline: any position can be looked up in constant time (resume is one integer), and
nothing depends on ranks or workers.
"""

from __future__ import annotations

from math import isqrt

ROUNDS = 6
MASK = 2**64 - 1


def mix(value: int) -> int:
    """SplitMix64's finaliser: a bijection on 64-bit integers in which every input bit moves every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def derive_key(*parts: int) -> int:
    """A 64-bit key from a sequence of integers; the order of the parts matters."""
    key = 0
    for part in parts:
        key = mix(key ^ mix(part & MASK))
    return key


def permute(index: int, size: int, key: int) -> int:
    """The image of `index` under a pseudo-random permutation of `range(size)` chosen by `key`.

    A Feistel network on the digits (left, right) of the index in a mixed radix a x b just above `size`: each round
    adds a keyed hash of one digit to the other, which can be undone, so the whole is a bijection on range(a * b).
    Results outside range(size) are permuted again ("cycle walking"), which keeps it a bijection on range(size).
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is outside range({size})")
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        left, right = divmod(index, columns)
        for number in range(ROUNDS):
            if number % 2:
                right = (right + mix(key ^ mix(left * ROUNDS + number))) % columns
            else:
                left = (left + mix(key ^ mix(right * ROUNDS + number))) % rows
        index = left * columns + right
        if index < size:
            return index
