"""`rae-scale model`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:  # without it, typer would make the one command the group itself
    """The named models."""


@app.command("layout")
def layout(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file, such as configs/run/demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")
    ] = None,
) -> None:
    """What each rank of CONFIG's run would hold of the model: weights, gradients, optimizer state, moving average.

    The model is split as for training, without memory and without other processes; sizes that do not fit are refused.
    """
    from rae_scale.config import load_config
    from rae_scale.train.layout import layout_report

    print(layout_report(load_config(config_path, overrides or ())))


@app.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Every named model with its sizes and parameter count (padding not counted)."""
    from rae_scale.models.zoo import model_table

    rows = model_table()
    if as_json:
        import json

        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "kind")
    for heading in ("hidden size", "depth", "heads", "parameters"):
        table.add_column(heading, justify="right")
    for row in rows:
        sizes = (row["hidden_size"], row["depth"], row["num_heads"], row["parameters"])
        table.add_row(row["name"], row["kind"], *(f"{size:,}" for size in sizes))
    Console().print(table)
