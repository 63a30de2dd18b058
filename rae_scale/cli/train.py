"""`rae-scale train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file, such as configs/run/demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved settings and stop.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check settings, data and model sizes without training, and stop.")
    ] = False,
) -> None:
    """Train what CONFIG describes.

    The same command continues a run that was stopped. To use several processes, start it with `deepspeed --module
    rae_scale train ...` or `torchrun -m rae_scale train ...` (see launchers/).
    """
    from rae_scale.config import dump_config, load_config

    config = load_config(config_path, overrides or ())
    if print_config:
        print(dump_config(config), end="")
        return
    from rae_scale import train as training

    if dry_run:
        print(training.dry_run(config))
    else:
        training.train(config)
