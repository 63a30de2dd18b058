"""Records that no machine has measured."""

from __future__ import annotations

from typing import Any

from rae_scale.bench.record import Measure, Record, Row

ENVIRONMENT = {"device": "NVIDIA H100 80GB HBM3", "power_limit_w": 700.0, "torch": "2.15.0", "cuda": "13.2"}


def row(number: int = 0, *, failed: str | None = None, **measures: Measure) -> Row:
    return Row({"data.micro_batch_size": number}, {"config": {"micro": number}}, {}, measures, {}, failed)


def record(*rows: Row, benchmark: str = "step", **environment: Any) -> Record:
    return Record(benchmark, "rae-scale bench step", "2026-01-01T00:00:00Z", ENVIRONMENT | environment, {}, list(rows))


def seconds(median: float, low: float, high: float) -> Measure:
    return Measure(median, low, high, 10)
