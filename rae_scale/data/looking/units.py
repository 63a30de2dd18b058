"""The units of a built data set: which shards each has, and what its manifest says became of the samples."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rae_scale.data.build.folder import RECORD_NAME, BuildFolder
from rae_scale.data.build.manifest import MANIFEST_NAME, Counts, Manifest, read_manifest
from rae_scale.data.build.units import units_of
from rae_scale.data.looking.open import SmallFiles
from rae_scale.data.mds_index import MDSIndex

UNNAMED = "(numbers only)"


@dataclass
class UnitCounts:
    """Sums over manifests. missing: units whose manifest is not there, or not one of this version."""

    units: int = 0
    counts: Counts = field(default_factory=Counts)
    damaged: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def add(self, name: str, manifest: Manifest | None) -> None:
        self.units += 1
        if manifest is None:
            self.missing.append(name)
            return
        self.counts += manifest.counts
        if manifest.damage:
            self.damaged[name] = manifest.damage


@dataclass(frozen=True)
class Partial:
    """A build that is not complete: no index yet. units: of the inputs it was begun with; done: those in place."""

    path: Path
    units: int
    done: UnitCounts
    bytes: int
    shards: int


def shards_of_units(index: MDSIndex) -> dict[str, list[int]]:
    """Shard numbers by unit, in the order of the index. A data set without units has none."""
    units: dict[str, list[int]] = {}
    for number, name in enumerate(index.names):
        unit, slash, _ = name.rpartition("/")
        if slash:
            units.setdefault(unit, []).append(number)
    return units


def built_shards(files: SmallFiles, index: MDSIndex) -> dict[str, list[int]]:
    """Shard numbers by unit, with the units that have none; empty for what `rae-scale data build` did not write.

    Raises ValueError for a damaged record of the build.
    """
    record = files.read(RECORD_NAME)
    if record is None:
        return {}
    try:
        names = [unit.name for unit in units_of(json.loads(record)["inputs"])]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{RECORD_NAME}: not what a build records ({error!r}); run the same build again") from None
    listed = shards_of_units(index)
    return {name: listed.get(name, []) for name in [*names, *listed]}


def corpus_of(unit: str) -> str:
    """What is the same in the names of all units of a corpus: `00012-cc12m-0012` is of `cc12m`."""
    stem = re.sub(r"^\d+-", "", unit)
    return re.sub(r"[-_]?\d+$", "", stem) or UNNAMED


def samples_by_corpus(units: dict[str, int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for unit, samples in units.items():
        counts[corpus_of(unit)] += samples
    return counts


def manifest_of(files: SmallFiles, unit: str) -> Manifest | None:
    """Read from wherever the data set is. None for one that is not there or that this version did not write."""
    data = files.read(f"{unit}/{MANIFEST_NAME}")
    try:
        return None if data is None else Manifest.from_json(data)
    except (KeyError, TypeError, ValueError):
        return None


def unit_counts(files: SmallFiles, units: Iterable[str]) -> UnitCounts:
    """Sums over the manifests of these units: one small file each."""
    found = UnitCounts()
    for unit in units:
        found.add(unit, manifest_of(files, unit))
    return found


def built_units(folder: Path) -> Iterator[tuple[str, Manifest]]:
    """The complete units in a local folder, by name: also those that no index lists yet."""
    for path in sorted(folder.glob(f"*/{MANIFEST_NAME}")):
        manifest = read_manifest(path.parent)
        if manifest is not None:
            yield path.parent.name, manifest


def read_partial(folder: Path) -> Partial | None:
    """What there is of a build without an index; None when the folder is none."""
    if not (folder / RECORD_NAME).exists():
        return None
    record = BuildFolder(folder).read_record()
    done, size, shards = UnitCounts(), 0, 0
    for name, manifest in built_units(folder):
        done.add(name, manifest)
        size += manifest.size
        shards += len(manifest.shards)
    return Partial(folder, len(record.inputs), done, size, shards)
