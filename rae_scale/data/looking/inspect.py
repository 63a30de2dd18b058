"""`rae-scale data inspect`: what is in a tar, a JSON lines file, a folder of shards, or a build that is not done."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rae_scale.data.looking.examine import Examined, examine
from rae_scale.data.looking.open import LOOK, SmallFiles, is_shards, shards_to_open
from rae_scale.data.looking.sampling import even_samples, even_shards, read_item
from rae_scale.data.looking.units import Partial, UnitCounts, built_shards, read_partial, unit_counts
from rae_scale.data.mds_format import INDEX_NAME
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.remote import is_remote
from rae_scale.data.sources import Source

# An MDS folder can hold millions of samples; statistics come from this many, evenly spaced.
MAX_EXAMINED = 10_000


@dataclass
class InspectReport:
    """What was found. `found` describes the samples that were examined, of all `samples`.

    kind:   tar, jsonl, mds, or `partial build`.
    units:  of a folder that `rae-scale data build` wrote, what its manifests count; None without units.
    inputs: units that a build was begun with; 0 where that is not recorded.
    """

    path: str
    kind: str
    samples: int
    bytes: int
    shards: int = 0
    found: Examined = field(default_factory=Examined)
    damage: str | None = None
    units: UnitCounts | None = None
    inputs: int = 0


def inspect(path: str | Path) -> InspectReport:
    """Look into a `.tar`, a `.jsonl`, an MDS folder or a URL of one. Images are measured by their headers, not decoded.

    Raises ValueError or FileNotFoundError when `path` is none of these. That a folder is intact takes `verify`.
    """
    if not is_shards(path):
        return inspect_file(Path(path))
    if not is_remote(str(path)) and not (Path(path) / INDEX_NAME).exists():
        partial = read_partial(Path(path))
        if partial is not None:
            return partial_report(partial)
    return inspect_shards(str(path))


def inspect_file(path: Path) -> InspectReport:
    source = Source(path)
    found = examine(source)
    kind = path.suffix.lower().lstrip(".")
    return InspectReport(str(path), kind, found.items, path.stat().st_size, found=found, damage=source.damage)


def inspect_shards(path: str) -> InspectReport:
    reader = MDSReader(path, LOOK)
    chosen = even_samples(reader.sizes, MAX_EXAMINED, even_shards(reader.sizes, shards_to_open(path)))
    found = examine(read_item(reader, int(index)) for _, indexes in chosen for index in indexes)
    report = InspectReport(
        reader.source, "mds", len(reader), int(reader.shard_bytes.sum()), len(reader.mds_index), found
    )
    files = SmallFiles(path)
    units = built_shards(files, reader.mds_index)
    if units:
        report.units = unit_counts(files, units)
    return report


def partial_report(partial: Partial) -> InspectReport:
    counts = partial.done.counts
    return InspectReport(
        str(partial.path),
        "partial build",
        counts.kept,
        partial.bytes,
        partial.shards,
        units=partial.done,
        inputs=partial.units,
    )
