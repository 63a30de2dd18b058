"""`rae-scale checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rae_scale.cli.options import Weights

app = typer.Typer(no_args_is_help=True, help="Look into, check and export checkpoints.")

Checkpoint = Annotated[Path, typer.Argument(help="Run folder (its newest checkpoint) or checkpoint.")]


@app.command()
def inspect(checkpoint: Checkpoint, tensors: Annotated[bool, typer.Option("--tensors")] = False) -> None:
    """Show which step, model and layout a checkpoint is of, and with --tensors the shape of every tensor."""
    from rae_scale.infer.load import find_checkpoint, stored_config
    from rae_scale.state import read_state
    from rae_scale.state.format import read_index

    path = find_checkpoint(checkpoint)
    config, state, index = stored_config(path), read_state(path), read_index(path)
    kinds = sorted({kind for entry in index.values() for kind in entry.ranges})
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"{path}: stage {config.stage}, model {config.model.name}, {size / 2**20:,.1f} MiB")
    print(f"  step {state['step']:,}, optimizer step {state['optimizer_step']:,}, seed {config.run.seed}")
    print(f"  written by {describe(state['layout'])}; {describe(state['versions'])}")
    print(
        f"  {len(index)} tensors, {sum(entry.numel for entry in index.values()):,} parameters; holds {', '.join(kinds)}"
    )
    if tensors:
        for name, entry in index.items():
            print(f"  {name} {list(entry.shape)}")


def describe(facts: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


@app.command()
def verify(checkpoint: Checkpoint) -> None:
    """Compare every file of a checkpoint with the hash it was written with; exit status 2 if one differs."""
    from rae_scale.infer.load import find_checkpoint
    from rae_scale.state.load import check_files

    path = find_checkpoint(checkpoint)
    check_files(path)
    print(f"{path}: every file is as it was written")


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", help="New folder.")],
    weights: Weights = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option()] = "float32",
    only: Annotated[
        list[str] | None, typer.Option(help="Only names with this beginning, such as dit.; repeat.")
    ] = None,
) -> None:
    """Write the weights alone, for run.init_from, model.encoder.path or model.decoder.path of another run."""
    from rae_scale.infer.export import export as export_checkpoint

    print(export_checkpoint(checkpoint, out, weights=weights, dtype=dtype, prefixes=only))
