"""Images that look nearly the same: perceptual hashes that differ in few of their 64 bits.

Pairs are found with the tables of Manku, Jain and Das Sarma, "Detecting Near-Duplicates for Web Crawling" (WWW 2007,
section 3): cut the 64 bits into b blocks; two hashes that differ in at most d bits agree in at least b - d blocks. So
for each choice of b - d blocks, only hashes that agree in them need to be compared. No pair is missed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import combinations, pairwise
from math import comb

import numpy as np

BITS = 64
MAX_DISTANCE = 8
MAX_PAIRS = 2**29  # 4 GiB of them; there are so many only when the distance is far too great for the images
# Real hashes are not spread evenly: buckets hold more pairs than even spreading would give.
CROWDING = 16
CHUNK = 2**20
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: spreads keys over the parts (Knuth, TAOCP 3, 6.4)


def find_near(looks: np.ndarray, max_distance: int, samples_at_once: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples that look nearly like an earlier one that is kept.

    looks: uint64 [n], perceptual hashes in the order of preference.

    Returns (dropped, kept), uint32 each and of equal length: `looks[dropped[i]]` is within `max_distance` bits of
    `looks[kept[i]]`, which stands earlier and is itself kept. The rule is greedy in that order: a sample is dropped
    when an earlier one that is kept is near. So of what is kept no two are near, and nothing is dropped for its
    resemblance to something that is not there, as chains of pairs (A like B, B like C) would do.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"max_distance={max_distance}: choose 0 to {MAX_DISTANCE} of the {BITS} bits")
    leader = np.arange(len(looks), dtype=np.uint32)
    for members in split(looks, np.uint64(2**BITS - 1), samples_at_once):
        mark_equal_looks(looks, members, leader)
    distinct = numbers_where(leader, own=True)
    dropped, kept = drop_greedily(near_pairs(looks[distinct], max_distance, samples_at_once), len(distinct))
    leader[distinct[dropped]] = distinct[kept]
    leader = leader[leader]  # equals of a dropped sample follow it
    dropped = numbers_where(leader, own=False)
    return dropped, leader[dropped]


def numbers_where(leader: np.ndarray, *, own: bool) -> np.ndarray:
    """The samples that are (or are not) their own leader, uint32 and rising; without temporaries of the full length."""
    chosen = [np.empty(0, np.uint32)]
    for start in range(0, len(leader), CHUNK):
        part = leader[start : start + CHUNK]
        numbers = np.arange(start, start + len(part), dtype=np.uint32)
        chosen.append(numbers[(part == numbers) == own])
    return np.concatenate(chosen)


def mark_equal_looks(looks: np.ndarray, members: np.ndarray, leader: np.ndarray) -> None:
    """Point each of `members` (rising) in `leader` at the first member of equal look."""
    order = np.argsort(looks[members], kind="stable")
    members = members[order]
    begins = np.ones(len(members), bool)
    begins[1:] = looks[members[1:]] != looks[members[:-1]]
    leader[members] = members[np.maximum.accumulate(np.where(begins, np.arange(len(members)), 0))]


def near_pairs(looks: np.ndarray, max_distance: int, samples_at_once: int) -> np.ndarray:
    """All pairs of different hashes within `max_distance`, as rising uint64 `later << 32 | earlier`."""
    if max_distance == 0:
        return np.empty(0, np.uint64)
    masks = block_masks(choose_blocks(len(looks), max_distance), max_distance)
    found: list[np.ndarray] = []
    total = 0
    for table, mask in enumerate(masks):
        for members in split(looks, mask, samples_at_once):
            for one, other in bucket_pairs(looks, members, mask):
                difference = looks[one] ^ looks[other]
                near = np.flatnonzero(np.bitwise_count(difference) <= max_distance)
                # A pair shows up in every table whose blocks agree; it is taken from the first of them.
                for earlier_mask in masks[:table]:
                    near = near[difference[near] & earlier_mask != 0]
                if len(near):
                    ends = np.stack((one[near], other[near])).astype(np.uint64)
                    found.append(ends.max(axis=0) << np.uint64(32) | ends.min(axis=0))
                    total += len(near)
                    if total > MAX_PAIRS:
                        raise ValueError(
                            f"max_distance={max_distance}: more than {MAX_PAIRS} pairs of images are that near; choose "
                            "a smaller distance"
                        )
    pairs = np.concatenate(found) if found else np.empty(0, np.uint64)
    pairs.sort()
    return pairs


def drop_greedily(pairs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Go through the pairs by their later sample: it is dropped when the earlier one is kept."""
    gone = bytearray(count)
    dropped, kept = array("I"), array("I")
    for start in range(0, len(pairs), CHUNK):
        part = pairs[start : start + CHUNK]
        earlier = (part & np.uint64(2**32 - 1)).tolist()
        for late, early in zip((part >> np.uint64(32)).tolist(), earlier, strict=True):
            if not gone[early] and not gone[late]:
                gone[late] = 1
                dropped.append(late)
                kept.append(early)
    return np.array(dropped, np.uint32), np.array(kept, np.uint32)


def choose_blocks(count: int, max_distance: int) -> int:
    """The number of blocks with the least work: more blocks make more tables with fewer pairs to compare in each."""

    def work(blocks: int) -> float:
        key_bits = BITS * (blocks - max_distance) / blocks
        return comb(blocks, max_distance) * (count * 64 + CROWDING * count**2 / 2**key_bits)

    return min(range(max_distance + 1, max_distance + 9), key=work)


def block_masks(blocks: int, max_distance: int) -> list[np.uint64]:
    """One mask for each choice of `blocks - max_distance` of the blocks."""
    edges = [BITS * block // blocks for block in range(blocks + 1)]
    block_bits = [2**end - 2**begin for begin, end in pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in combinations(block_bits, blocks - max_distance)]


def split(looks: np.ndarray, mask: np.uint64, samples_at_once: int) -> Iterator[np.ndarray]:
    """The samples in parts of about `samples_at_once`, uint32 and rising; equals under the mask share a part."""
    bits = max(0, -(-len(looks) // samples_at_once) - 1).bit_length()
    if bits == 0:
        yield np.arange(len(looks), dtype=np.uint32)
        return
    for part in range(2**bits):
        chosen = []
        for start in range(0, len(looks), CHUNK):
            spread = (looks[start : start + CHUNK] & mask) * MIX >> np.uint64(BITS - bits)
            chosen.append((np.flatnonzero(spread == part) + start).astype(np.uint32))
        yield np.concatenate(chosen)


def bucket_pairs(looks: np.ndarray, members: np.ndarray, mask: np.uint64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of members that agree under the mask, in arrays of at most the length of `members`."""
    keys = looks[members] & mask
    order = np.argsort(keys)
    keys, members = keys[order], members[order]
    at = np.arange(len(members))
    for distance in range(1, len(members)):
        at = at[: np.searchsorted(at, len(members) - distance)]
        at = at[keys[at] == keys[at + distance]]
        if not len(at):
            return
        yield members[at], members[at + distance]
