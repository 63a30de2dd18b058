"""Writes one unit: the samples of an input file as MDS shards, beside the list of those that were left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rae_scale.data.build.duplicates import LeftOut, check_scanned, duplicates_of, hash_of_duplicates
from rae_scale.data.build.folder import BuildFolder
from rae_scale.data.build.inputs import InputFile
from rae_scale.data.build.manifest import MANIFEST_NAME, Counts, Manifest, read_manifest
from rae_scale.data.build.options import BuildOptions
from rae_scale.data.build.units import Unit
from rae_scale.data.mds_writer import MDSWriter, Rows, write_synced
from rae_scale.data.record import BadSample
from rae_scale.data.sources import Source

REJECTED_NAME = "rejected.jsonl"


@dataclass(frozen=True)
class Done:
    """A unit that is in its place. written: now, or else by an earlier build."""

    manifest: Manifest
    written: bool


@dataclass(frozen=True)
class WriteUnit:
    """Makes units, wherever it is sent: `WriteUnit(...)(unit)`.

    options_hash: of everything that the folder records, which is more than `options`.
    always_hash:  read every input again to see whether it is the one that was built.
    buffers:      memory for two shards, kept from unit to unit.
    """

    folder: BuildFolder
    options: BuildOptions
    options_hash: str
    always_hash: bool = False
    buffers: tuple[Rows, Rows] = field(default_factory=lambda: (Rows(), Rows()), repr=False, compare=False)

    def __call__(self, unit: Unit) -> Done:
        left_out = duplicates_of(self.folder, unit) if self.options.dedup != "off" else None
        manifest, written = self.folder.make(
            unit.name,
            current=lambda: self.current(unit, left_out),
            write=lambda place: self.write(unit, left_out, place),
        )
        return Done(manifest, written)

    def current(self, unit: Unit, left_out: LeftOut | None) -> Manifest | None:
        """The manifest of the unit as it is there, if it is what this build would write."""
        place = self.folder.path / unit.name
        manifest = read_manifest(place)
        if manifest is None or not is_complete(manifest, place):
            return None
        if (manifest.options, manifest.duplicates) != (self.options_hash, hash_of_duplicates(left_out)):
            return None
        file = InputFile(unit.path)
        same = file.is_still(manifest.input, place / MANIFEST_NAME, always_hash=self.always_hash)
        return manifest if same else None

    def write(self, unit: Unit, left_out: LeftOut | None, place: Path) -> Manifest:
        """Write the unit into the empty folder `place`."""
        source = self.options.source(unit.path)
        writer = MDSWriter(place, self.options.shard_bytes, self.buffers)
        writing = Writing(source, self.options, left_out or {}, writer)
        with InputFile(unit.path).identified() as found:
            if left_out is not None:
                check_scanned(self.folder, unit, found)
            write_synced(place / REJECTED_NAME, (json.dumps(line).encode("ascii") + b"\n" for line in writing.lines()))
            shards = writer.close()
        manifest = Manifest(
            unit=unit.name,
            input=found,
            options=self.options_hash,
            duplicates=hash_of_duplicates(left_out),
            counts=writing.counts,
            damage=source.damage,
            shards=shards,
        )
        manifest.check()
        write_synced(place / MANIFEST_NAME, [manifest.to_json()])
        return manifest


def is_complete(manifest: Manifest, place: Path) -> bool:
    """Whether the files of a unit are there, with their sizes."""
    try:
        sizes = [(place / shard["raw_data"]["basename"]).stat().st_size for shard in manifest.shards]
        return (place / REJECTED_NAME).exists() and sizes == [shard["raw_data"]["bytes"] for shard in manifest.shards]
    except OSError:
        return False


@dataclass
class Writing:
    source: Source
    options: BuildOptions
    duplicates: LeftOut
    writer: MDSWriter
    counts: Counts = field(default_factory=Counts)

    def lines(self) -> Iterator[dict[str, str]]:
        """Write the samples; yields a line for each that is left out, and one for damage to the input itself."""
        for position, item in enumerate(self.source):
            self.counts.read += 1
            if position in self.duplicates:
                self.counts.duplicates += 1
                yield self.line(item.key, "duplicate", f"of {self.duplicates[position]}")
                continue
            try:
                sample = self.options.usable(item)
            except BadSample as problem:
                self.counts.rejected[problem.reason] += 1
                yield self.line(item.key, problem.reason, problem.detail)
                continue
            self.writer.write(sample)
            self.counts.kept += 1
        if self.source.damage:
            yield self.line("", "damaged input", self.source.damage)

    def line(self, key: str, reason: str, detail: str) -> dict[str, str]:
        return {"source": self.source.path.name, "key": key, "reason": reason, "detail": detail}
