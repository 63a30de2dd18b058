"""Bad samples met while training: each is listed with its reason, and too many of them stop the run."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

# Fewer samples than this say nothing about a rate: with a limit of 1 %, the run stops at the 11th bad one of the first
# thousand, not at the first one of the first step.
LEAST_SEEN = 1000


class TooManyBadSamples(ValueError):
    """More samples could not be used than `data.max_bad_fraction` allows."""


@dataclass(frozen=True)
class BadRecord:
    """One sample that could not be used: where it stands in the data, and at which global position it was wanted."""

    source: str
    shard: str
    index: int
    key: str
    position: int
    reason: str
    detail: str


class Quarantine:
    """Appends bad samples to a JSON lines file and counts them against the limit.

    Ranks of one run share the file: each record is one write to a file opened for appending.
    """

    def __init__(self, path: str | Path, max_bad_fraction: float) -> None:
        self.path = Path(path)
        self.max_bad_fraction = max_bad_fraction
        self.seen = 0
        self.reasons: Counter[str] = Counter()

    def add(self, seen: int, records: Iterable[BadRecord]) -> None:
        """Count `seen` samples, of which `records` were bad. Raises TooManyBadSamples."""
        self.seen += seen
        for record in records:
            self.reasons[record.reason] += 1
            self._append(record)
        bad = self.reasons.total()
        if bad > self.max_bad_fraction * max(self.seen, LEAST_SEEN):
            raise TooManyBadSamples(
                f"{bad} of {self.seen} samples could not be used ({self.summary()}), more than data.max_bad_fraction="
                f"{self.max_bad_fraction} allows; they are listed in {self.path}. Rebuild the shards or raise the limit"
            )

    def summary(self) -> str:
        """Counts by reason, the most frequent first: `undecodable image 3, no image 1`."""
        return ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())

    def _append(self, record: BadRecord) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, json.dumps(asdict(record)).encode("ascii") + b"\n")
        finally:
            os.close(descriptor)
