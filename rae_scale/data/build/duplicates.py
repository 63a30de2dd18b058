"""The search for duplicates: every unit is scanned to a file of fingerprints, then all of those are compared.

fingerprints/<unit>/records.bin, scan.json      32 bytes per usable sample
fingerprints/duplicates/table.npy, found.json   which samples are left out, and the scans that say so
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from rae_scale.data.build.folder import BuildFolder
from rae_scale.data.build.inputs import Input, InputFile
from rae_scale.data.build.options import BuildOptions, hash_of
from rae_scale.data.build.units import Unit, unit_name
from rae_scale.data.dedup import Duplicates, find_duplicates, fingerprint, write_fingerprints
from rae_scale.data.mds_writer import write_synced
from rae_scale.data.record import BadSample
from rae_scale.data.sources import Source

FINGERPRINTS = "fingerprints"
RECORDS_NAME = "records.bin"
SCAN_NAME = "scan.json"
FOUND = f"{FINGERPRINTS}/duplicates"
TABLE_NAME = "table.npy"
FOUND_NAME = "found.json"
# Comparing tens of millions of samples takes minutes; the other builders of a folder wait for the first.
COMPARE_PATIENCE_S = 6 * 3600.0

LeftOut = Mapping[int, str]
"""The duplicates in a unit, by their position in its input, and what each is a duplicate of."""


@dataclass(frozen=True)
class Scan:
    """`scan.json`: what a unit's fingerprints were made from, and how many there are. options: hash of all options."""

    input: Input
    options: str
    fingerprints: int


@dataclass(frozen=True)
class ScanUnit:
    """Makes fingerprints, wherever it is sent: `ScanUnit(...)(unit)`. Fields: as of `WriteUnit`."""

    folder: BuildFolder
    options: BuildOptions
    options_hash: str
    always_hash: bool = False

    def __call__(self, unit: Unit) -> Scan:
        name = f"{FINGERPRINTS}/{unit.name}"
        return self.folder.make(name, lambda: self.current(unit), lambda place: self.write(unit, place))[0]

    def current(self, unit: Unit) -> Scan | None:
        place = self.folder.path / FINGERPRINTS / unit.name
        scan = read_scan(place)
        if scan is None or scan.options != self.options_hash:
            return None
        same = InputFile(unit.path).is_still(scan.input, place / SCAN_NAME, always_hash=self.always_hash)
        return scan if same else None

    def write(self, unit: Unit, place: Path) -> Scan:
        records = fingerprints(self.options.source(unit.path), self.options)
        with InputFile(unit.path).identified() as found:
            count = write_fingerprints(place / RECORDS_NAME, records)
        scan = Scan(found, self.options_hash, count)
        write_synced(place / SCAN_NAME, [json.dumps(asdict(scan), sort_keys=True, indent=1).encode("ascii")])
        return scan


def fingerprints(source: Source, options: BuildOptions) -> Iterator[bytes]:
    """Of the samples as they will be written. What will be rejected has none: it must not replace another sample."""
    for position, item in enumerate(source):
        try:
            yield fingerprint(
                options.usable(item),
                position,
                perceptual=options.dedup == "near",
                max_pixels=options.prepare.max_pixels,
            )
        except BadSample:
            continue


def read_scan(place: Path) -> Scan | None:
    """None when there is none that is whole."""
    try:
        fields = json.loads((place / SCAN_NAME).read_bytes())
        return Scan(Input(**fields.pop("input")), **fields)
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def check_scanned(folder: BuildFolder, unit: Unit, found: Input) -> None:
    """Raises ValueError when the input is not the one that was scanned: its duplicates are known by their positions."""
    scan = read_scan(folder.path / FINGERPRINTS / unit.name)
    if scan is None or scan.input != found:
        raise ValueError(f"{unit.path}: changed after it was looked through for duplicates; build again")


def unscanned(folder: BuildFolder, units: Sequence[Unit], options_hash: str) -> list[Unit]:
    scans = [read_scan(folder.path / FINGERPRINTS / unit.name) for unit in units]
    return [unit for unit, scan in zip(units, scans, strict=True) if scan is None or scan.options != options_hash]


def compare(folder: BuildFolder, units: Sequence[Unit], options: BuildOptions) -> None:
    """Find the duplicates among all units, unless that was done. Every unit must have been scanned."""
    places = [folder.path / FINGERPRINTS / unit.name for unit in units]
    scans = hash_of([(place / SCAN_NAME).read_text() for place in places])

    def current() -> str | None:
        try:
            found = json.loads((folder.path / FOUND / FOUND_NAME).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return scans if found == {"scans": scans} else None

    def write(place: Path) -> str:
        found = find_duplicates([place / RECORDS_NAME for place in places], options.near_distance)
        table = BytesIO()
        np.save(table, found.table)
        write_synced(place / TABLE_NAME, [table.getvalue()])
        write_synced(place / FOUND_NAME, [json.dumps({"scans": scans}).encode("ascii")])
        return scans

    folder.make(FOUND, current, write, patience_s=COMPARE_PATIENCE_S)


def duplicates_of(folder: BuildFolder, unit: Unit) -> LeftOut:
    """The duplicates in one unit, as `compare` found them."""
    table = np.load(folder.path / FOUND / TABLE_NAME, mmap_mode="r")
    rows = Duplicates(0, table).of_unit(unit.number)
    inputs = folder.read_record().inputs if len(rows) else []
    names = {number: unit_name(number, Path(inputs[number])) for number in set(rows["of_unit"].tolist())}
    return {
        position: f"{'nearly ' if near else ''}number {of_position} of {names[of_unit]}"
        for _, position, of_unit, of_position, near in rows.tolist()
    }


def hash_of_duplicates(left_out: LeftOut | None) -> str | None:
    return None if left_out is None else hash_of(list(left_out.items()))
