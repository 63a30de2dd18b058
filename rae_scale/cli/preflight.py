"""`rae-scale preflight`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def preflight(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file, such as configs/run/demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="A check to make, and no other; can be repeated.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="A check to leave out; can be repeated.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that ranks have to come.")] = 120.0,
    network: Annotated[
        str | None,
        typer.Option(help="What joins machines, such as ib-ndr-400; default: what is usual."),
    ] = None,
) -> None:
    """Find what would stop or slow the run of CONFIG, and say where, before its first step.

    Start it as the training itself: one process per rank with any launcher; or alone, to look at this machine only.
    Exit status 1 if a check fails. See docs/preflight.md.
    """
    import json
    import os
    import sys

    # Of a rank that is waited for in vain we say more than PyTorch's own warnings, which it reads now.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from rae_scale.config import load_config
    from rae_scale.preflight.bounded import any_stuck
    from rae_scale.preflight.run import Options, Outcome
    from rae_scale.preflight.run import preflight as look

    def show(outcome: Outcome) -> None:
        print(json.dumps(outcome.to_json(), indent=1) if as_json else outcome.to_text(), flush=True)

    config = load_config(config_path, overrides or ())
    status = 0 if look(config, Options(only or (), skip or (), timeout, network), show) else 1
    if any_stuck():
        sys.stderr.flush()
        os._exit(status)
    raise typer.Exit(status)
