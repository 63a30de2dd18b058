"""`rae-scale checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rae_scale.cli.options import Weights

app = typer.Typer(no_args_is_help=True, help="Look into, check, rewrite and export checkpoints.")

Checkpoint = Annotated[Path, typer.Argument(help="Run folder (its newest checkpoint) or checkpoint.")]


@app.command()
def inspect(checkpoint: Checkpoint, tensors: Annotated[bool, typer.Option("--tensors")] = False) -> None:
    """Show which step, model and layout a checkpoint is of, what it holds in which files, and with --tensors the shape
    of every tensor and in how many pieces it lies."""
    from rae_scale.infer.load import find_checkpoint, stored_config
    from rae_scale.state import read_state
    from rae_scale.state.index import read_index

    path = find_checkpoint(checkpoint)
    config, state, index = stored_config(path), read_state(path), read_index(path)
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"{path}: stage {config.stage}, model {config.model.name}, {mebibytes(size)}")
    print(f"  step {state['step']:,}, optimizer step {state['optimizer_step']:,}, seed {config.run.seed}")
    print(f"  written by {describe(state['layout'])}; {describe(state['versions'])}")
    print(f"  {len(index)} tensors, {sum(entry.numel for entry in index.values()):,} parameters")
    for kind in sorted({kind for entry in index.values() for kind in entry.pieces}):
        held = [entry for entry in index.values() if kind in entry.pieces]
        print(f"  {kind}: {len(held)} tensors, {sum(entry.numel for entry in held):,} elements")
    files = sorted(file.stat().st_size for file in path.glob("*.safetensors"))
    print(f"  {len(files)} tensor files of {mebibytes(files[0])} to {mebibytes(files[-1])}")
    if tensors:
        for name, entry in index.items():
            pieces = ", ".join(f"{kind} in {len(pieces)}" for kind, pieces in sorted(entry.pieces.items()))
            print(f"  {name} {list(entry.shape)}: {pieces}")


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


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
def reshard(
    source: Checkpoint,
    destination: Annotated[Path, typer.Argument(help="New folder.")],
    files: Annotated[int, typer.Option("--files", min=1, help="Number of tensor files.")],
) -> None:
    """Write a checkpoint once more, in another number of files of equal size; it loads the same, bit for bit."""
    from rae_scale.infer.load import find_checkpoint
    from rae_scale.state import reshard_checkpoint

    print(reshard_checkpoint(find_checkpoint(source), destination, files))


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


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="Checkpoint of any format (the format is recognised), or run folder.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
    kind: Annotated[
        Literal["weight", "ema", "exp_avg", "exp_avg_sq"] | None,
        typer.Option(help="Compare this kind alone. Default: every kind that both have."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Run file with the model's settings, where neither checkpoint has them.")
    ] = None,
) -> None:
    """Compare two checkpoints tensor by tensor; exit status 1 if they differ."""
    from rae_scale.config import load_config
    from rae_scale.convert.diff import diff as compare

    found = compare(
        a, b, kinds=None if kind is None else [kind], config=None if config is None else load_config(config)
    )
    for line in (*found.remarks, *found.differences):
        print(line)
    print(f"{found.tensors:,} tensors ({', '.join(found.kinds)}) of {found.elements:,} elements: ", end="")
    print(f"{len(found.differences):,} differ" if found.differences else "no difference")
    if found.differences:
        raise typer.Exit(1)
