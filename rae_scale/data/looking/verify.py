"""`rae-scale data verify`: is a data set whole? All of it is read: index, manifests, shards, rows, images.

Memory does not grow with the data: a worker reads one shard after another, row by row. Shards of a remote data set pass
through a small cache on local disk, which is removed at the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rae_scale.data.build.units import Part
from rae_scale.data.decode import DEFAULT_MAX_PIXELS, BadImage, decode_image
from rae_scale.data.looking.open import SmallFiles, opened
from rae_scale.data.looking.problems import MOST_LISTED_OF_FILE, Problem, Problems
from rae_scale.data.looking.units import UnitCounts, built_shards
from rae_scale.data.looking.verify_units import check_folder, check_unit
from rae_scale.data.looking.workers import in_processes
from rae_scale.data.mds_reader import BadShard, MDSReader
from rae_scale.data.read_options import ReadOptions
from rae_scale.data.record import BadSample

WHOLE = Part(0, 1)
GB = 10**9
# Of the largest shard, for each worker: the one that is read, the one that is fetched, and both may be compressed too.
CACHED_SHARDS = 4
IMAGE_FIX = "training will replace it and list it; to leave it out, build again into a new folder with --verify decode"


@dataclass
class ShardCheck:
    """What became of one or more shards. samples, images: read and decoded without a complaint."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    images: int = 0
    unhashed: int = 0
    problems: Problems = field(default_factory=Problems)

    def merge(self, other: ShardCheck) -> None:
        self.shards += other.shards
        self.samples += other.samples
        self.bytes += other.bytes
        self.images += other.images
        self.unhashed += other.unhashed
        self.problems.merge(other.problems)


@dataclass
class VerifyReport:
    """part: the share of shards and units that was checked, of all `shards_in_all` shards and `units_in_all` units."""

    source: str
    fingerprint: str
    part: Part
    shards_in_all: int
    samples_in_all: int
    units_in_all: int
    decoded: bool
    units: UnitCounts = field(default_factory=UnitCounts)
    checked: ShardCheck = field(default_factory=ShardCheck)

    @property
    def problems(self) -> Problems:
        return self.checked.problems

    def as_json(self) -> dict[str, Any]:
        counts = self.units.counts
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "part": f"{self.part.index}/{self.part.count}",
            "in_all": {"shards": self.shards_in_all, "samples": self.samples_in_all, "units": self.units_in_all},
            "checked": {
                "shards": self.checked.shards,
                "samples": self.checked.samples,
                "bytes": self.checked.bytes,
                "images_decoded": self.checked.images if self.decoded else None,
                "shards_without_hash": self.checked.unhashed,
                "units": self.units.units,
            },
            "manifests": {
                "read": counts.read,
                "kept": counts.kept,
                "rejected": dict(counts.rejected),
                "duplicates": counts.duplicates,
                "damaged_inputs": self.units.damaged,
            },
            "problem_counts": dict(self.problems.counts),
            "problems": [asdict(problem) for problem in self.problems.listed],
        }


def verify(path: str | Path, *, decode: bool = False, workers: int = 1, part: Part = WHOLE) -> VerifyReport:
    """Check a folder of shards or a URL of one.

    decode: also decode every image. part: every `count`-th shard and unit from the `index`-th on.

    Raises ValueError when there is no index to begin with, or a source cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="rae-scale-verify-") as cache:
        largest = int(MDSReader(path).shard_bytes.max(initial=1))
        options = ReadOptions(cache_dir=Path(cache), cache_gb=CACHED_SHARDS * workers * largest / GB)
        reader = MDSReader(path, options)
        files = SmallFiles(path, options)
        units = built_shards(files, reader.mds_index)
        report = VerifyReport(
            source=reader.source,
            fingerprint=reader.fingerprint,
            part=part,
            shards_in_all=len(reader.mds_index),
            samples_in_all=len(reader),
            units_in_all=len(units),
            decoded=decode,
        )
        for problem in unit_problems(reader, files, units, part, report.units):
            report.problems.add(problem)
        numbers = range(part.index, len(reader.mds_index), part.count)
        for found in in_processes(partial(check_shard, str(path), options, decode), numbers, workers):
            report.checked.merge(found)
        opened.cache_clear()
    return report


def unit_problems(
    reader: MDSReader, files: SmallFiles, units: dict[str, list[int]], part: Part, found: UnitCounts
) -> Iterator[Problem]:
    for unit in list(units)[part.index :: part.count]:
        yield from check_unit(reader.mds_index, files, unit, units[unit], found)
    if not files.store.remote and part == WHOLE:
        yield from check_folder(Path(reader.source), reader.mds_index)


def check_shard(path: str, options: ReadOptions, decode: bool, number: int) -> ShardCheck:
    """Read a shard: its size, hash and offsets when it is opened, then every row."""
    reader = opened(path, options)
    shard = reader.mds_index[number]
    check = ShardCheck(shards=1, bytes=shard.bytes, unhashed=int(shard.format.hash is None))
    check.problems.most = MOST_LISTED_OF_FILE
    first = int(reader.sizes[:number].sum())
    unit = shard.name.rpartition("/")[0]
    again = f"remove {unit}/ and run the same build again" if unit else "copy it again, or build the folder again"
    for row in range(shard.samples):
        try:
            sample = reader[first + row]
            check.samples += 1
            if decode and sample.image is not None:
                decode_image(sample.image, DEFAULT_MAX_PIXELS)
                check.images += 1
        except BadShard as problem:
            what = problem.detail.removeprefix(f"{reader.source}/{shard.name}: ")
            check.problems.add(Problem("shard", shard.name, what, again))
            break
        except BadSample as problem:
            fix = IMAGE_FIX if isinstance(problem, BadImage) else again
            check.problems.add(Problem(problem.reason, f"{shard.name}:{row}", problem.detail, fix))
    return check
