"""Bad samples met while training: each is listed with its reason, and too many of them stop the run.

Every position that was asked for is counted once: seen = used + replaced. A sample that cannot be used has a line of
its own; of a shard that is bad as a whole there is one line, however many of its samples are asked for. What cannot be
written (a full disk) is kept and written when there is room: training does not depend on this file.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from rae_scale.data.append import AppendedLines

logger = logging.getLogger(__name__)

# Fewer samples than this say nothing about a rate: with a limit of 1 %, the run stops at the 11th bad one of the first
# thousand, not at the first one of the first step.
LEAST_SEEN = 1000


class TooManyBadSamples(ValueError):
    """More samples could not be used than `data.max_bad_fraction` allows."""


@dataclass(frozen=True)
class BadRecord:
    """One sample that could not be used: where it stands in the data, and at which global position it was wanted.

    samples: how many are bad with it: those of the shard, if `shard_lost`.
    lost:    the share of all positions that a lost shard takes away in the long run.
    """

    source: str
    shard: str
    index: int
    key: str
    position: int
    reason: str
    detail: str
    samples: int = 1
    shard_lost: bool = False
    lost: float = 0.0

    def line(self) -> bytes:
        """As JSON. A lost shard has no index and no key."""
        values = asdict(self)
        if self.shard_lost:
            values |= {"index": None, "key": None}
        return json.dumps(values).encode("ascii") + b"\n"


class Quarantine:
    """Appends bad samples to a JSON lines file and counts them against the limit.

    Ranks of one run share the file. Those that meet the same bad shard at the same moment may each list it.
    """

    def __init__(self, path: str | Path, max_bad_fraction: float) -> None:
        self.path = Path(path)
        self.max_bad_fraction = max_bad_fraction
        self.seen = 0
        self.replaced = 0
        self.reasons: Counter[str] = Counter()
        self._replaced_alone = 0  # not for a lost shard
        self._lost: dict[tuple[str, str], float] = {}
        self._lines = AppendedLines(path)

    @property
    def used(self) -> int:
        """Positions that got the sample they asked for."""
        return self.seen - self.replaced

    def add(self, seen: int, records: Collection[BadRecord]) -> None:
        """Count `seen` positions and the attempts at them that failed. Raises TooManyBadSamples."""
        self.seen += seen
        self.replaced += len({record.position for record in records})
        self._replaced_alone += len({record.position for record in records if not record.shard_lost})
        for record in records:
            self._warn_first(record)
            self.reasons[record.reason] += 1
            if not record.shard_lost:
                self._lines.add(record.line())
            elif (record.source, record.shard) not in self._lost:
                self._lost[record.source, record.shard] = record.lost
                if not self._is_listed(record):
                    self._lines.add(record.line())
        self._lines.write()
        self._check_limit()

    def close(self) -> None:
        """Write what is left, and say what was replaced."""
        self._lines.write()
        if self._lines.waiting:
            logger.error("%s: cannot be written; %d lines are lost", self.path, len(self._lines.waiting))
        if self.replaced:
            logger.info(
                "data: of %d samples %d were used and %d replaced (%s)",
                self.seen,
                self.used,
                self.replaced,
                self.summary(),
            )

    def summary(self) -> str:
        """Counts by reason, the most frequent first: `undecodable image 3, no image 1`."""
        return ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())

    def _check_limit(self) -> None:
        # A lost shard counts by its size: with shuffle blocks its samples come in a bunch, so that their rate among
        # those seen says nothing about all of them.
        lost = sum(self._lost.values())
        if self._replaced_alone / max(self.seen, LEAST_SEEN) + lost > self.max_bad_fraction:
            shards = f", and {len(self._lost)} bad shards hold {lost:.2%} of the data" if self._lost else ""
            raise TooManyBadSamples(
                f"{self.replaced} of {self.seen} samples could not be used ({self.summary()}){shards}, more than "
                f"data.max_bad_fraction={self.max_bad_fraction} allows; they are listed in {self.path}. Rebuild the "
                "shards or raise the limit"
            )

    def _warn_first(self, record: BadRecord) -> None:
        if record.reason not in self.reasons:
            logger.warning(
                "a sample of %s/%s is replaced: %s (%s); this and others are listed in %s",
                record.source,
                record.shard,
                record.reason,
                record.detail,
                self.path,
            )

    def _is_listed(self, record: BadRecord) -> bool:
        """Whether another rank, or this one before a restart, has listed a lost shard."""
        if not self.path.is_file():  # there is none yet, or it is a device
            return False
        with self.path.open("rb") as lines:
            return any(is_shard(line, record.source, record.shard) for line in lines)


def is_shard(line: bytes, source: str, shard: str) -> bool:
    try:
        record = json.loads(line)
    except ValueError:  # torn by a full disk
        return False
    if not isinstance(record, dict) or not record.get("shard_lost"):
        return False
    return (record.get("source"), record.get("shard")) == (source, shard)
