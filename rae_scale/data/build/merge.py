"""The merge: one index over all units, once they are all there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rae_scale.data.build.duplicates import duplicates_of, hash_of_duplicates
from rae_scale.data.build.folder import BuildFolder, Record
from rae_scale.data.build.inputs import READ_BYTES
from rae_scale.data.build.manifest import Counts, Manifest, read_manifest
from rae_scale.data.build.units import Unit, units_of
from rae_scale.data.build.write import REJECTED_NAME, is_complete
from rae_scale.data.mds_format import INDEX_NAME
from rae_scale.data.mds_writer import write_durably

LISTED = 10
"""Units that an error names; the others it counts."""


@dataclass
class BuildReport:
    """What became of the samples of the units of a build.

    damaged:   inputs that could not be read to their end, and why, by unit; how many samples they lost is unknown.
    written:   units that were not there before.
    unscanned: units that other builders have to scan before duplicates can be known; nothing was written meanwhile.
    merged:    whether the folder is a data set now.
    """

    out_dir: Path
    units: int = 0
    written: int = 0
    counts: Counts = field(default_factory=Counts)
    damaged: dict[str, str] = field(default_factory=dict)
    shards: int = 0
    bytes: int = 0
    unscanned: list[str] = field(default_factory=list)
    merged: bool = False

    def add(self, manifest: Manifest) -> None:
        self.units += 1
        self.counts += manifest.counts
        self.shards += len(manifest.shards)
        self.bytes += manifest.size
        if manifest.damage is not None:
            self.damaged[manifest.unit] = manifest.damage


def merge(out_dir: str | Path) -> BuildReport:
    """Make the index over all units of `out_dir`, and one list of what was left out.

    Raises ValueError when units are missing (naming them), when totals do not reconcile, and while a build is running.
    """
    folder = BuildFolder(Path(out_dir).absolute())
    record = folder.read_record()
    with folder.builder(alone=True):
        report = merge_units(folder, record)
        folder.remove_partial()
    return report


def merge_units(folder: BuildFolder, record: Record) -> BuildReport:
    units = units_of(record.inputs)
    manifests = [(unit, read_manifest(folder.path / unit.name)) for unit in units]
    problems = {unit.name: problem_of(folder, record, unit, manifest) for unit, manifest in manifests}
    missing = [f"{name} ({problem})" for name, problem in problems.items() if problem]
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise ValueError(
            f"{folder.path}: {len(missing)} of {len(units)} units are not there: {', '.join(missing[:LISTED])}{more}; "
            "run the build again, it writes only these"
        )
    report = BuildReport(folder.path)
    whole = [manifest for _, manifest in manifests if manifest is not None]
    for manifest in whole:
        manifest.check()
        report.add(manifest)
    report.counts.check(str(folder.path))
    write_durably(folder.path / REJECTED_NAME, all_rejected(folder.path, whole))
    index = {"version": 2, "shards": [entry for manifest in whole for entry in entries(manifest)]}
    write_durably(folder.path / INDEX_NAME, [json.dumps(index, sort_keys=True).encode("ascii")])
    report.merged = True
    return report


def problem_of(folder: BuildFolder, record: Record, unit: Unit, manifest: Manifest | None) -> str | None:
    """Why a unit cannot be part of the index; None when it can."""
    if manifest is None:
        return "missing"
    if manifest.options != record.hash:
        return "of other options"
    if not is_complete(manifest, folder.path / unit.name):
        return "shards are missing or cut"
    if manifest.duplicates is not None:
        left_out = duplicates_of(folder, unit)
        if manifest.duplicates != hash_of_duplicates(left_out):
            return "of an earlier search for duplicates"
    return None


def entries(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """The unit's shards as entries of the whole folder's index, as mosaicml-streaming's merge_index writes them."""
    for shard in manifest.shards:
        basename = f"{manifest.unit}/{shard['raw_data']['basename']}"
        yield {**shard, "raw_data": {**shard["raw_data"], "basename": basename}}


def all_rejected(path: Path, manifests: Sequence[Manifest]) -> Iterator[bytes]:
    for manifest in manifests:
        with open(path / manifest.unit / REJECTED_NAME, "rb") as file:
            while data := file.read(READ_BYTES):
                yield data
