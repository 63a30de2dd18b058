"""`rae-scale report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, running or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Say how a run is doing: its state, and how much of its wall time became training, over all its attempts.

    Effective training time is what computing the steps took that the result contains, over the wall time since the run
    was first started. The rest is listed by cause (docs/running.md).
    """
    from rae_scale.train.watch import report

    values = report.report(run)
    print(json.dumps(values, indent=2) if as_json else report.describe(values))
