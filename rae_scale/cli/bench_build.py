"""`rae-scale bench data-build`: how fast data sets are built."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rae_scale.cli.bench_options import THRESHOLD, Baseline, Fail, Note, Out, Repeats, Reporting, Threshold


def data_build(
    images: Annotated[int, typer.Option(min=1, help="Pictures in all tars together.")] = 32_000,
    made_size: Annotated[int, typer.Option(min=32, help="Side of them in pixels.")] = 512,
    files: Annotated[int, typer.Option(min=1, help="Tars.")] = 8,
    workers: Annotated[list[int] | None, typer.Option(min=1, help="Processes; repeat for several rows.")] = None,
    verify: Annotated[Literal["header", "decode"], typer.Option(help="As of `data build`.")] = "header",
    folder: Annotated[
        Path, typer.Option(help="Where to write and read, on the file system in question; left as it was.")
    ] = Path("."),
    repeats: Repeats = 5,
    out: Out = None,
    note: Note = "",
    baseline: Baseline = None,
    threshold: Threshold = THRESHOLD,
    fail_on_regression: Fail = False,
) -> None:
    """Build MDS shards from tars of JPEGs that pass through, beside a plain read, hash and write of the same bytes."""
    from rae_scale.bench.data_build import DATA_BUILD, Work, bench_data_build
    from rae_scale.bench.session import open_session

    reporting = Reporting(DATA_BUILD, out, baseline, threshold, fail_on_regression, note)
    work = [Work(images, made_size, files, number, verify) for number in workers or [1]]
    with open_session([], "cpu") as session:
        record = bench_data_build(work, session, folder=folder, repeats=repeats, after_row=reporting.after_row)
        reporting.finish(record, session)
