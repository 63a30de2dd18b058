"""The frame of every benchmark: a sweep over settings, a row for each, and files after each row.

A benchmark says what its cases are and how one is measured. Here it is decided which points a sweep has, what becomes
of one that cannot be or runs out of memory, and what is written.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rae_scale.bench.machine import environment, power_draw
from rae_scale.bench.record import Measure, Record, Row
from rae_scale.bench.session import Session
from rae_scale.config import Config, ConfigError, parse_config
from rae_scale.config.load import split_override
from rae_scale.config.schema import ParallelConfig

logger = logging.getLogger(__name__)

Overrides = tuple[str, ...]
"""`key=value`, as on the command line."""


class Measured(NamedTuple):
    """What a case found; see `Row`."""

    measures: dict[str, Measure]
    values: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Something to measure. See `Row` for settings, facts and varied.

    run: measures it. Collective, like everything that several processes do. What it may raise and still be a row:
        ValueError (a setting cannot be), FloatingPointError (nothing worth timing was computed), out of memory.
    """

    settings: dict[str, Any]
    facts: dict[str, Any]
    run: Callable[[], Measured]
    varied: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """Settings that the points of a sweep are added to, one by one. origin: names them in errors."""

    tree: dict[str, Any]
    overrides: Overrides
    origin: str

    def config(self, point: Overrides = ()) -> Config:
        """
        Raises:
            ValueError: it is no valid configuration.
        """
        return parse_config(self.tree, [*self.overrides, *point], origin=self.origin)


@dataclass(frozen=True)
class Benchmark:
    """How a kind of record is shown.

    name:    of the files and in the record.
    title:   of the report.
    columns: of its table, over `Row.flat`.
    finish:  adds to the rows' values what only all of them together tell; called after every row.
    notes:   lines under the table, from the record so far.
    chart:   draws the record into a PNG file.
    """

    name: str
    title: str
    columns: Mapping[str, str]
    chart: Callable[[Record, Path], None]
    finish: Callable[[list[Row]], None] = lambda rows: None
    notes: Callable[[Record], list[str]] = lambda record: []


def sweep_points(sweeps: Sequence[str]) -> list[Overrides]:
    """The product of the sweeps, the last one fastest. Each is `key=value,value`; commas within brackets part nothing.

    Raises:
        ValueError: one is no such text, or two are of the same key.
    """
    keys = [key_of(text) for text in sweeps]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"--sweep {key}=... is given {keys.count(key)} times; give all its values once")
    values = [split_values(text.partition("=")[2]) for text in sweeps]
    return [tuple(f"{key}={value}" for key, value in zip(keys, point, strict=True)) for point in product(*values)]


def key_of(text: str) -> str:
    key, equals, values = text.partition("=")
    if not key or not equals or not all(split_values(values)):
        raise ValueError(f"--sweep {text!r}: write it as KEY=VALUE,VALUE, for example data.micro_batch_size=1,2,4")
    return key


def split_values(text: str) -> list[str]:
    values, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth:
            values.append("")
        else:
            values[-1] += character
    return values


def layouts_of(points: Iterable[Overrides], config_of: Callable[[Overrides], Config]) -> list[ParallelConfig]:
    """Of the points that are a configuration; the others say what is wrong with them when it is their turn."""
    found = []
    for point in points:
        try:
            found.append(config_of(point).parallel)
        except ConfigError:
            continue
    return found


def check_relevant(benchmark: str, overrides: Iterable[str], sections: Sequence[str]) -> None:
    """Refuse settings that a benchmark would read and not heed. sections: as in `record.config_sections`.

    Raises:
        ValueError: an override is of none of the sections.
    """
    for key, _ in map(split_override, overrides):
        if not any(key == section or key.startswith(f"{section}.") for section in sections):
            raise ValueError(
                f"{key} changes nothing that `bench {benchmark}` measures, which depends on {', '.join(sections)}; "
                "leave it out"
            )


def run_benchmark(
    benchmark: Benchmark,
    points: Sequence[Overrides],
    cases_of: Callable[[Overrides], Sequence[Case]],
    session: Session,
    *,
    facts: dict[str, Any] | None = None,
    after_row: Callable[[Record], None] = lambda record: None,
) -> Record:
    """Measure every case of every point. Collective.

    cases_of: what there is to measure at a point. facts: of `Record`. after_row: called on the main process with the
    record so far, so that whatever ends the rest, what was measured is kept.

    Raises:
        ValueError: the only point there is cannot be. One of several becomes a row that says so.
    """
    record = Record(benchmark.name, command_line(), now(), environment(session.device), facts or {})
    for point in points:
        varied = dict(split_override(override) for override in point)
        try:
            cases = cases_of(point)
        except ValueError as error:
            if len(points) == 1:
                raise
            cases = [Case({"overrides": list(point)}, {}, refuse(error))]
        for case in cases:
            row = Row({**varied, **case.varied}, case.settings, case.facts)
            if any(row.settings_hash == other.settings_hash for other in record.rows):
                raise ValueError(f"{row.name}: its settings are those of a row before it; leave one of the two out")
            record.rows.append(row)
            measure_case(case, row, session)
            benchmark.finish(record.rows)
            if session.is_main:
                after_row(record)
    return record


def measure_case(case: Case, row: Row, session: Session) -> None:
    """Fill the row. Collective."""
    failed, found = None, Measured({}, {})
    try:
        found = case.run()
    except Exception as error:
        failed = why(error)
        if failed is None:
            raise
    # Several processes are at one in what they go on with.
    reasons = {reason: None for reason in session.gather(failed) if reason is not None}
    if reasons:
        row.failed = "; ".join(reasons)
        if session.is_main:
            logger.warning("%s: %s", row.name, row.failed)
        return
    row.measures = found.measures
    row.values = {**found.values, "power_draw_w": power_draw(session.device)}


def why(error: Exception) -> str | None:
    """What a row says of an error; None if it is a defect and no property of the settings."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        return "out of memory"
    if isinstance(error, ValueError | FloatingPointError):
        return str(error)
    return None


def refuse(error: ValueError) -> Callable[[], Measured]:
    def run() -> Measured:
        raise error

    return run


def command_line() -> str:
    """The command that is running, as one would type it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
        return shlex.join(["torchrun", f"--nproc-per-node={processes}", "-m", "rae_scale", *sys.argv[1:]])
    name = Path(sys.argv[0]).name
    return shlex.join(["rae-scale" if name == "__main__.py" else name, *sys.argv[1:]])


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
