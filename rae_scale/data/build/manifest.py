"""`manifest.json` of a unit: what it was made from, what became of the samples, and what was written.

It holds no time and no host, so that the same input gives the same bytes wherever and whenever it is built.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rae_scale.data.build.inputs import Input

MANIFEST_NAME = "manifest.json"
VERSION = 1


@dataclass
class Counts:
    """What became of the samples of an input: `read == kept + rejected + duplicates`.

    rejected: how many for each reason. duplicates: usable, but the same as one that is kept.
    """

    read: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.read + other.read,
            self.kept + other.kept,
            self.rejected + other.rejected,
            self.duplicates + other.duplicates,
        )

    def check(self, name: str) -> None:
        """Raises ValueError when samples got lost or were counted twice."""
        accounted = self.kept + self.rejected.total() + self.duplicates
        if self.read != accounted:
            raise ValueError(
                f"{name}: {self.read} samples came in, but {self.kept} kept + {self.rejected.total()} rejected + "
                f"{self.duplicates} duplicates are {accounted}; remove this folder and build again"
            )


@dataclass(frozen=True)
class Manifest:
    """One unit.

    options:    hash of the build's options.
    duplicates: hash of the list of its samples that are left out as duplicates; None without such a search.
    damage:     why the input could not be read to its end, else None. How many samples that lost is unknown.
    shards:     entries of an MDS index, with names relative to the unit's folder.
    """

    unit: str
    input: Input
    options: str
    duplicates: str | None
    counts: Counts
    damage: str | None
    shards: list[dict[str, Any]]

    @property
    def size(self) -> int:
        """Bytes of the shards."""
        return sum(shard["raw_data"]["bytes"] for shard in self.shards)

    def check(self) -> None:
        """Raises ValueError when its totals do not reconcile with each other or with its shards."""
        self.counts.check(self.unit)
        stored = sum(shard["samples"] for shard in self.shards)
        if stored != self.counts.kept:
            raise ValueError(
                f"{self.unit}: {self.counts.kept} samples were kept, but its shards hold {stored}; remove this folder "
                "and build again"
            )

    def to_json(self) -> bytes:
        counts = {**vars(self.counts), "rejected": dict(self.counts.rejected)}
        fields = {"version": VERSION, **vars(self), "input": vars(self.input), "counts": counts}
        return json.dumps(fields, sort_keys=True, indent=1).encode("ascii") + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Raises ValueError, KeyError or TypeError for anything that this version did not write."""
        fields = json.loads(data)
        if fields.pop("version") != VERSION:
            raise ValueError("another version of rae-scale wrote it")
        counts = fields.pop("counts")
        counts["rejected"] = Counter(counts["rejected"])
        return cls(input=Input(**fields.pop("input")), counts=Counts(**counts), **fields)


def read_manifest(folder: Path) -> Manifest | None:
    """None when there is none that this version wrote."""
    try:
        return Manifest.from_json((folder / MANIFEST_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError):
        return None
