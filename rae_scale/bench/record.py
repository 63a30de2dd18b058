"""What a benchmark leaves behind: a record, which is a row for each setting measured and what all rows share.

docs/benchmarks/README.md explains the fields to readers of the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rae_scale.bench.timing import summary
from rae_scale.config import Config

SCHEMA = 1
"""Of the JSON files. To be raised when a field's meaning changes: records of two schemas are not compared."""


@dataclass(frozen=True)
class Measure:
    """Over all repeats: median, first and ninth decile. Less is better, whatever it measures.

    unit: seconds, or bytes, which are counted once and have no spread.
    """

    median: float
    low: float
    high: float
    repeats: int
    unit: Literal["s", "bytes"] = "s"

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Measure:
        return cls(*summary(seconds), repeats=len(seconds))

    @classmethod
    def count(cls, number: int) -> Measure:
        return cls(number, number, number, 1, "bytes")


@dataclass
class Row:
    """One setting and what was measured with it.

    varied:   how this row differs from the others: swept settings, and what the benchmark itself varies.
    settings: everything that decides the numbers, apart from machine and code. Rows with equal settings are compared.
    facts:    of `facts_of`, for readers who will not search the settings.
    measures: what a baseline is compared in. values: whatever else is known, derived from them as a rule.
    failed:   why nothing was measured.
    """

    varied: dict[str, Any]
    settings: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, Measure] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None

    @property
    def settings_hash(self) -> str:
        """16 hexadecimal digits; independent of the order of keys."""
        canonical = json.dumps(self.settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """For tables and charts: what is particular about this row."""
        return ", ".join(f"{short(key)} {value}" for key, value in self.varied.items()) or "as configured"

    def flat(self) -> dict[str, Any]:
        """Everything that a table's column may want, by name: `varied` (dots as underscores), `values`, and of each
        measure NAME_ms, NAME_low_ms and NAME_high_ms, or NAME_gb."""
        found: dict[str, Any] = {key.replace(".", "_"): value for key, value in self.varied.items()}
        found |= {"name": self.name, **self.values}
        found |= {"failed": " ".join(self.failed.split())} if self.failed else {}
        for name, measure in self.measures.items():
            if measure.unit == "bytes":
                found[f"{name}_gb"] = measure.median / 1e9
            else:
                found[f"{name}_ms"] = 1e3 * measure.median
                found |= {f"{name}_low_ms": 1e3 * measure.low, f"{name}_high_ms": 1e3 * measure.high}
        return found


def short(key: str) -> str:
    """A setting's name without its section, unless it is one that many sections have."""
    leaf = key.rpartition(".")[2]
    return key if leaf in ("name", "path") else leaf


@dataclass
class Record:
    """environment: of `machine.environment`. facts: measured once for all rows. date: UTC. note: what whoever measured
    wants readers to know."""

    benchmark: str
    command: str
    date: str
    environment: dict[str, Any]
    facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        head = {
            "schema": SCHEMA,
            "benchmark": self.benchmark,
            "command": self.command,
            "date": self.date,
            "note": self.note,
            "environment": self.environment,
            "facts": self.facts,
        }
        return {**head, "rows": [{"settings_hash": row.settings_hash, **asdict(row)} for row in self.rows]}


def read_record(path: str | Path) -> Record:
    """
    Raises:
        ValueError: it is no record, or one of another schema.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no JSON file ({error}); give the .json that a benchmark wrote with --out"
        ) from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema {schema}, and this release reads {SCHEMA}; measure it again with this release"
            if schema is not None
            else f"{path} is no record of a benchmark; give the .json that `rae-scale bench` wrote with --out"
        )
    try:
        fields = {name: value for name, value in data.items() if name not in ("schema", "rows")}
        return Record(**fields, rows=[read_row(row) for row in data["rows"]])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks fields of a record ({error!r}); measure it again with this release") from None


def read_row(data: Mapping[str, Any]) -> Row:
    fields = {name: value for name, value in data.items() if name != "settings_hash"}
    return Row(**{**fields, "measures": {name: Measure(**value) for name, value in data["measures"].items()}})


def config_sections(config: Config, sections: Iterable[str]) -> dict[str, Any]:
    """These settings in full, for `Row.settings`: a section's name, or section.key for one of it."""
    found: dict[str, Any] = {}
    tree = config.model_dump(mode="json")
    for name in sections:
        section, _, key = name.partition(".")
        found[name] = tree[section][key] if key else tree[section]
    return found


def facts_of(
    config: Config, *, precision: str | None, kernels: str | None = None, flops: dict[str, Any] | None = None
) -> dict[str, Any]:
    """precision: that is computed in. kernels: which operations ran. flops: of `flop_count`. Each None where the
    benchmark has none."""
    parallel = config.parallel
    axes = {name: getattr(parallel, name) for name in ("dp_replicate", "dp_shard", "sp", "tp")}
    return {
        "precision": precision,
        "kernels": kernels,
        "world_size": parallel.world_size,
        "layout": axes,
        "flops": flops,
    }


def flop_count(formula: str, per_image: float, *, encoder_counted: bool) -> dict[str, Any]:
    """formula: by which name in `rae_scale.models.flops`. per_image: model FLOPs, without what is computed again."""
    return {"formula": formula, "per_image": per_image, "encoder_counted": encoder_counted}
