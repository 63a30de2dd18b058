"""Samples with the same content: those whose 128-bit hashes are equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rae_scale.data.dedup.records import read_fingerprints


def find_exact(paths: Sequence[Path], starts: np.ndarray, samples_at_once: int) -> np.ndarray:
    """For every sample the number of the first one with its content (its own when that is itself), uint32 [N].

    starts: int64 [files + 1], the number of each file's first sample; the last entry is N.

    The hashes are dealt with in parts by their leading bits, so that `samples_at_once` of them are in memory; the files
    are read once for each part.
    """
    total = int(starts[-1])
    first = np.arange(total, dtype=np.uint32)
    bits = max(0, -(-total // samples_at_once) - 1).bit_length()
    for part in range(2**bits):
        hashes, numbers = [np.empty((0, 2), np.uint64)], [np.empty(0, np.uint32)]
        for path, start in zip(paths, starts[:-1], strict=True):
            content = read_fingerprints(path)["content"]
            chosen = np.flatnonzero(content[:, 0] >> np.uint64(64 - bits) == part) if bits else np.arange(len(content))
            hashes.append(content[chosen])
            numbers.append((chosen + start).astype(np.uint32))
        mark_equal(np.concatenate(hashes), np.concatenate(numbers), first)
    return first


def mark_equal(hashes: np.ndarray, numbers: np.ndarray, first: np.ndarray) -> None:
    """Point every sample in `first` at the first one of equal hash. `numbers` rise; hashes: uint64 [n, 2]."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal hashes keep the order of their numbers
    hashes, numbers = hashes[order], numbers[order]
    begins = np.ones(len(numbers), bool)
    begins[1:] = np.any(hashes[1:] != hashes[:-1], axis=1)
    leader = np.maximum.accumulate(np.where(begins, np.arange(len(numbers)), 0))
    first[numbers] = numbers[leader]
