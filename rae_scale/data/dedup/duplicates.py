"""Which samples of a corpus are duplicates of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rae_scale.data.dedup.exact import find_exact
from rae_scale.data.dedup.near import find_near, numbers_where
from rae_scale.data.dedup.records import count_fingerprints, read_fingerprints

# Samples that are sorted in one piece; about 60 bytes each.
SAMPLES_AT_ONCE = 2**22

DUPLICATE = np.dtype(
    [
        ("unit", "<u4"),  # file of fingerprints, by its place in the list
        ("position", "<u4"),  # of the duplicate, in its input file
        ("of_unit", "<u4"),  # the sample that is kept instead
        ("of_position", "<u4"),
        ("near", "?"),  # found by its look; else by its content
    ]
)


@dataclass(frozen=True)
class Duplicates:
    """What to leave out: `table` has one entry of `DUPLICATE` for each, sorted by (unit, position)."""

    samples: int
    table: np.ndarray

    @property
    def exact(self) -> int:
        return len(self.table) - self.near

    @property
    def near(self) -> int:
        return int(np.count_nonzero(self.table["near"]))

    def of_unit(self, unit: int) -> np.ndarray:
        """The entries of one file."""
        begin, end = np.searchsorted(self.table["unit"], (unit, unit + 1))
        return self.table[begin:end]


def find_duplicates(
    paths: Sequence[str | Path], max_distance: int | None = None, *, samples_at_once: int = SAMPLES_AT_ONCE
) -> Duplicates:
    """Find the samples that an earlier one makes superfluous. Earlier is by (place of the file in `paths`, position).

    paths:        files of fingerprints, in an order that is always the same for the same corpus.
    max_distance: also images whose perceptual hashes differ in at most so many of 64 bits, 0 to 8. (They differ in an
                  even number.) 2 finds the same picture in another size or quality, 6 also with its edges cut. Pictures
                  of text on plain paper look alike to it. null finds equal content only.

    A sample with the content of an earlier one goes. Of the others, a sample goes when it looks nearly like an earlier
    one that stays. (When that happens to a sample that has equals, these name the one that stays as well.)

    Memory: 4 bytes per sample for equal content, 33 for near looks, 8 for each pair of near looks, and about 60 for
    each of `samples_at_once`: 2.7 GB for 73 million samples. Raises ValueError for damaged files.
    """
    files = [Path(path) for path in paths]
    starts = np.cumsum([0, *(count_fingerprints(path) for path in files)])
    total = int(starts[-1])
    if total >= 2**32:
        raise ValueError(f"{total} samples: at most {2**32 - 1} can be compared at once; find duplicates in parts")
    first = find_exact(files, starts, samples_at_once)
    near = np.zeros(total, bool)
    if max_distance is not None:
        numbers, looks = load_looks(files, starts, first)
        dropped, kept = find_near(looks, max_distance, samples_at_once)
        first[numbers[dropped]] = numbers[kept]
        near[numbers[dropped]] = True
        first = first[first]
    return Duplicates(total, make_table(files, starts, first, near))


def load_looks(files: Sequence[Path], starts: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (uint32) and perceptual hashes (uint64) of the samples that have one and no equal before them."""
    numbers, looks = np.empty(len(first), np.uint32), np.empty(len(first), np.uint64)
    count = 0
    for path, start in zip(files, starts[:-1], strict=True):
        records = read_fingerprints(path)
        own = np.arange(start, start + len(records), dtype=np.uint32)
        chosen = np.flatnonzero((first[start : start + len(records)] == own) & (records["has_look"] != 0))
        end = count + len(chosen)
        numbers[count:end] = own[chosen]
        looks[count:end] = records["look"][chosen]
        count = end
    return numbers[:count], looks[:count]


def make_table(files: Sequence[Path], starts: np.ndarray, first: np.ndarray, near: np.ndarray) -> np.ndarray:
    duplicates = numbers_where(first, own=False).astype(np.int64)
    originals = first[duplicates].astype(np.int64)
    table = np.empty(len(duplicates), DUPLICATE)
    table["unit"] = np.searchsorted(starts, duplicates, "right") - 1
    table["of_unit"] = np.searchsorted(starts, originals, "right") - 1
    table["near"] = near[duplicates]
    by_original = np.argsort(originals, kind="stable")
    for unit, path in enumerate(files):
        positions = read_fingerprints(path)["position"]
        begin, end = np.searchsorted(duplicates, starts[unit : unit + 2])
        table["position"][begin:end] = positions[duplicates[begin:end] - starts[unit]]
        begin, end = np.searchsorted(originals, starts[unit : unit + 2], sorter=by_original)
        rows = by_original[begin:end]
        table["of_position"][rows] = positions[originals[rows] - starts[unit]]
    return table
