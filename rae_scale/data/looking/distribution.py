"""A distribution of numbers as counts of values: exact, small, and two of them add up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

BINS = 40
# A range of more decades than this is drawn and binned logarithmically.
LOG_RATIO = 30.0
QUANTILES = {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}


class Distribution:
    """How often each value >= 0 occurs.

    step: values are counted by their multiple of it, which bounds the memory; least, most and mean stay exact.
    """

    def __init__(self, step: float = 1) -> None:
        self.step = step
        self.counts: Counter[int] = Counter()
        self.least = math.inf
        self.most = -math.inf
        self.sum = 0.0

    def add(self, value: float) -> None:
        # To the nearest one: 0.07 // 0.01 is 6.
        self.counts[round(value / self.step)] += 1
        self.least, self.most = min(self.least, value), max(self.most, value)
        self.sum += value

    def merge(self, other: Distribution) -> None:
        """Add the values of another distribution of the same step."""
        assert self.step == other.step
        self.counts.update(other.counts)
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.sum += other.sum

    def __len__(self) -> int:
        return self.counts.total()

    @property
    def mean(self) -> float:
        return self.sum / len(self)

    def quantile(self, share: float) -> float:
        """The smallest value (to `step`) that is not below `share` of all; there must be values."""
        wanted, seen = share * len(self), 0
        for key in sorted(self.counts):
            seen += self.counts[key]
            if seen >= wanted:
                break
        return min(max(key * self.step, self.least), self.most)

    def histogram(self, bins: int = BINS) -> tuple[list[float], list[int]]:
        """Edges [bins + 1] and counts [bins]; bins are of equal ratio where values differ by much, else of equal width.

        There must be values. A single one makes a single bin.
        """
        low, high = self.least, self.most
        if low == high:
            return [low, high], [len(self)]
        edges = log_edges(low, high, bins) if high > LOG_RATIO * max(low, self.step) else even_edges(low, high, bins)
        counts = [0] * bins
        number = 0
        for key in sorted(self.counts):
            while number < bins - 1 and key * self.step >= edges[number + 1]:
                number += 1
            counts[number] += self.counts[key]
        return edges, counts

    def summary(self) -> dict[str, Any] | None:
        """For JSON: count, mean, extremes, quantiles, histogram. None without values."""
        if not len(self):
            return None
        edges, counts = self.histogram()
        quantiles = {name: rounded(self.quantile(share)) for name, share in QUANTILES.items()}
        spread = {"least": rounded(self.least), **quantiles, "most": rounded(self.most)}
        bins = {"edges": [rounded(edge) for edge in edges], "counts": counts}
        return {"count": len(self), "mean": rounded(self.mean), **spread, "histogram": bins}


def is_logarithmic(edges: Sequence[float]) -> bool:
    """Whether `histogram` chose bins of equal ratio."""
    return len(edges) > 2 and not math.isclose(edges[2] - edges[1], edges[-1] - edges[-2], rel_tol=1e-6)


def even_edges(low: float, high: float, bins: int) -> list[float]:
    return [low + (high - low) * number / bins for number in range(bins)] + [high]


def log_edges(low: float, high: float, bins: int) -> list[float]:
    """From `low`, which may be 0: the first bin then begins there, the others at 1 and on."""
    first = max(low, 1e-2 if high < 100 else 1.0)
    edges = [first * (high / first) ** (number / bins) for number in range(bins)] + [high]
    return [low, *edges[1:]]


def rounded(value: float) -> float | int:
    """Four significant digits of a fraction, all digits of a whole number."""
    return int(value) if value == int(value) else float(f"{value:.4g}")
