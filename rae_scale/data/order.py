"""A shuffle that is a function: where element `i` goes is computed, no list of indices is ever held.

Two consequences carry the data pipeline: any position can be looked up in constant time (resume is one integer), and
nothing depends on ranks or workers. `mix`, `derive_key` and `permute` say what is computed; `mix_many`, `derive_keys`
and `permute_many` compute the same for whole arrays.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
WordArray = npt.NDArray[np.uint64]

ROUNDS = 6
MASK = 2**64 - 1


def mix(value: int) -> int:
    """SplitMix64's finaliser: a bijection on 64-bit integers in which every input bit moves every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def mix_many(values: WordArray) -> WordArray:
    """`mix` of each element."""
    values = values + np.uint64(0x9E3779B97F4A7C15)  # arrays of uint64 wrap around: that is the mask
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """A 64-bit key from a sequence of integers; the order of the parts matters."""
    key = 0
    for part in parts:
        key = mix(key ^ mix(part & MASK))
    return key


def derive_keys(*parts: int | IntArray | WordArray) -> WordArray:
    """`derive_key` of parts that are integers or 1-d arrays of one length n (at least one is): uint64 `[n]`."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        words = np.array([part & MASK], np.uint64) if isinstance(part, int) else part.astype(np.uint64)
        key = mix_many(key ^ mix_many(words))
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


def permute_many(indices: IntArray, sizes: IntArray, keys: WordArray) -> IntArray:
    """`permute` of each element of `indices` `[n]`; `sizes` and `keys` are `[n]` or `[1]`."""
    outside = (indices < 0) | (indices >= sizes)
    if outside.any():
        first = int(outside.argmax())
        raise ValueError(f"index {indices[first]} is outside range({np.broadcast_to(sizes, indices.shape)[first]})")
    rows = integer_root((sizes - 1).astype(np.uint64)) + np.uint64(1)
    limits = sizes.astype(np.uint64)
    columns = (limits + rows - np.uint64(1)) // rows
    images = indices.astype(np.uint64)
    limits, rows, columns, keys = (np.broadcast_to(each, images.shape) for each in (limits, rows, columns, keys))
    walking = np.arange(len(images))
    while walking.size:
        images[walking] = feistel(images[walking], rows[walking], columns[walking], keys[walking])
        walking = walking[images[walking] >= limits[walking]]
    return images.astype(np.int64)


def feistel(images: WordArray, rows: WordArray, columns: WordArray, keys: WordArray) -> WordArray:
    left, right = np.divmod(images, columns)
    for number in range(ROUNDS):
        # Reduced before it is added: the sum of a digit and a whole word would not fit in 64 bits.
        if number % 2:
            right = (right + round_hash(keys, left, number) % columns) % columns
        else:
            left = (left + round_hash(keys, right, number) % rows) % rows
    return left * columns + right


def round_hash(keys: WordArray, digits: WordArray, number: int) -> WordArray:
    return mix_many(keys ^ mix_many(digits * np.uint64(ROUNDS) + np.uint64(number)))


def integer_root(values: WordArray) -> WordArray:
    """isqrt of each element; the floating-point root of a large one can be off by one."""
    root = np.sqrt(values.astype(np.float64)).astype(np.uint64)
    root -= (root * root > values).astype(np.uint64)
    return root + ((root + np.uint64(1)) ** 2 <= values).astype(np.uint64)
