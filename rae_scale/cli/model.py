"""`rae-scale model`."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:  # without it, typer would make the one command the group itself
    """The named models."""


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
