"""The build: units, on one of the engines, then the merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from rae_scale.data.build.duplicates import ScanUnit, compare, unscanned
from rae_scale.data.build.folder import BuildFolder
from rae_scale.data.build.merge import BuildReport, merge_units
from rae_scale.data.build.options import BuildOptions
from rae_scale.data.build.pool import run_local
from rae_scale.data.build.ray_engine import run_ray
from rae_scale.data.build.units import Part, Unit, units_of
from rae_scale.data.build.write import Done, WriteUnit

R = TypeVar("R")

Engine = Literal["local", "ray"]
ENGINES = {"local": run_local, "ray": run_ray}


def build(
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    options: BuildOptions | None = None,
    *,
    workers: int = 1,
    engine: Engine = "local",
    part: Part | None = None,
    always_hash: bool = False,
    on_scan: Callable[[Unit], None] = lambda unit: None,
    on_unit: Callable[[Unit, Done], None] = lambda unit, done: None,
) -> BuildReport:
    """Write the samples of `inputs` as MDS shards into `out_dir`, one unit (a folder in it) per input file.

    A unit appears when it is complete on disk. Units that are there already, made with the same options from the same
    input, are kept: a build that was killed goes on where it was, and ends in the same bytes as one that was not. What
    cannot be used is left out and listed with its reason in `rejected.jsonl`.

    workers:     units at a time; 1 with the local engine works in this process.
    engine:      "local" has processes of this machine, "ray" those of a Ray cluster that sees the same folders.
    part:        build these units alone, without the merge: for several builders of one folder. `merge` follows.
    always_hash: read every input again to see whether it is the one that was built; else its size and date decide.
    on_scan, on_unit: called with each unit as it is scanned for duplicates, and when it is in its place.

    The report is about all units, or those of the part.

    Raises ValueError or FileNotFoundError, before anything is written, for an input that is missing or of an unknown
    kind, an `out_dir` with other content or begun with other options or inputs, and another build at work in it.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: choose local or ray")
    if workers < 1:
        raise ValueError(f"workers={workers}: give at least 1")
    options = options or BuildOptions()
    units = units_of(inputs)
    for unit in units:
        options.source(unit.path)  # refuses what cannot be read
    recorded = options.recorded()
    folder = BuildFolder(Path(out_dir).absolute())
    folder.check_free()
    run = ENGINES[engine]
    own = units if part is None else part.of(units)
    report = BuildReport(folder.path)
    with folder.builder(alone=part is None):
        record = folder.record(recorded, units)
        if options.dedup != "off":
            scan = ScanUnit(folder, options, record.hash, always_hash)
            run(scan, own, workers, lambda unit, _: on_scan(unit))
            report.unscanned = [unit.name for unit in unscanned(folder, units, record.hash)]
            if report.unscanned:
                return report
            compare(folder, units, options)
        done: dict[int, Done] = {}

        def collect(unit: Unit, result: Done) -> None:
            done[unit.number] = result
            on_unit(unit, result)

        run(WriteUnit(folder, options, record.hash, always_hash), own, workers, collect)
        if part is None:
            report = merge_units(folder, record)
            folder.remove_partial()
        else:
            for unit in own:
                report.add(done[unit.number].manifest)
        report.written = sum(result.written for result in done.values())
    return report
