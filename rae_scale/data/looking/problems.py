"""What a check found to be wrong, bounded: all is counted, and as much of it listed as anyone reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

MOST_LISTED = 2000
MOST_LISTED_OF_FILE = 20


@dataclass(frozen=True)
class Problem:
    """kind: one or two words to count by. where: file, or file:row. what: what is wrong with it. fix: what to do."""

    kind: str
    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.fix}"


@dataclass
class Problems:
    """counts: by kind, complete. listed: the first ones."""

    most: int = MOST_LISTED
    counts: Counter[str] = field(default_factory=Counter)
    listed: list[Problem] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        self.counts[problem.kind] += 1
        if len(self.listed) < self.most:
            self.listed.append(problem)

    def merge(self, other: Problems) -> None:
        self.counts.update(other.counts)
        self.listed += other.listed[: max(0, self.most - len(self.listed))]

    def __len__(self) -> int:
        return self.counts.total()
