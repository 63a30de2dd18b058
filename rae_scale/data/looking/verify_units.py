"""Are the units of a built data set, its manifests and its index of one opinion?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rae_scale.data.build.manifest import MANIFEST_NAME, Manifest
from rae_scale.data.build.write import REJECTED_NAME
from rae_scale.data.looking.open import SmallFiles
from rae_scale.data.looking.problems import Problem
from rae_scale.data.looking.units import UnitCounts, built_units, manifest_of, shards_of_units
from rae_scale.data.mds_format import INDEX_NAME
from rae_scale.data.mds_index import MDSIndex

BUILD_AGAIN = "run the same build again: it makes what is missing and leaves the rest"


def check_unit(
    index: MDSIndex, files: SmallFiles, unit: str, numbers: Sequence[int], found: UnitCounts
) -> Iterator[Problem]:
    """One unit of the index: its manifest against itself, against the index, and against its list of rejected ones."""
    manifest = manifest_of(files, unit)
    found.add(unit, manifest)
    where = f"{unit}/{MANIFEST_NAME}"
    if manifest is None:
        yield Problem("manifest", where, "missing, or not one that this version wrote", BUILD_AGAIN)
        return
    remove = f"remove {unit}/ and {BUILD_AGAIN}"
    try:
        manifest.check()
    except ValueError as error:
        yield Problem("counts", where, str(error), remove)
    if manifest.unit != unit:
        yield Problem("manifest", where, f"is of unit {manifest.unit}", remove)
    listed = [entry_of_index(index, number) for number in numbers]
    own = [entry_of_manifest(unit, entry) for entry in manifest.shards]
    for entry in sorted(set(listed) ^ set(own)):
        there, missing = (INDEX_NAME, "the manifest") if entry in listed else (where, INDEX_NAME)
        what = f"{there} lists it with {entry[1]} samples, {entry[2]} bytes, hash {entry[3]}; {missing} does not"
        yield Problem("manifest", entry[0], what, remove)
    yield from check_rejected(files, unit, manifest, remove)


def entry_of_index(index: MDSIndex, number: int) -> tuple[str, int, int, str]:
    shard = index[number]
    return shard.name, shard.samples, shard.bytes, shard.digest


def entry_of_manifest(unit: str, entry: Mapping[str, Any]) -> tuple[str, int, int, str]:
    raw = entry["raw_data"]
    return f"{unit}/{raw['basename']}", entry["samples"], raw["bytes"], next(iter(raw["hashes"].values()), "")


def check_rejected(files: SmallFiles, unit: str, manifest: Manifest, fix: str) -> Iterator[Problem]:
    where = f"{unit}/{REJECTED_NAME}"
    data = files.read(where)
    if data is None:
        yield Problem("rejected", where, "missing", fix)
        return
    try:
        reasons = Counter(str(json.loads(line)["reason"]) for line in data.splitlines())
    except (KeyError, TypeError, ValueError) as error:
        yield Problem("rejected", where, f"not the list that a build writes ({error!r:.100})", fix)
        return
    expected = Counter(manifest.counts.rejected)
    expected["duplicate"] += manifest.counts.duplicates
    expected["damaged input"] += manifest.damage is not None
    for reason in sorted(expected.keys() | reasons.keys()):
        if expected[reason] != reasons[reason]:
            what = f"lists {reasons[reason]} samples as {reason!r}, the manifest counts {expected[reason]}"
            yield Problem("rejected", where, what, fix)


def check_folder(folder: Path, index: MDSIndex) -> Iterator[Problem]:
    """What only a local folder can be asked: is there something that the index does not know of?"""
    listed = set(index.names)
    units = shards_of_units(index)
    for unit, manifest in built_units(folder):
        if unit not in units and manifest.shards:
            what = f"complete, with {manifest.counts.kept} samples that {INDEX_NAME} does not list"
            yield Problem("not in the index", unit, what, "merge again (run the same build), or remove it")
    for path in sorted([*folder.glob("*.mds"), *folder.glob("*/*.mds")]):
        name = path.relative_to(folder).as_posix()
        unit = name.rpartition("/")[0]
        if name not in listed and (unit in units or not unit):
            yield Problem("not in the index", name, "a shard that the index does not list", "remove it")
