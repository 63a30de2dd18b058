"""`rae-scale bench`, and its commands for operators."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rae_scale.cli import bench_build, bench_parts, bench_steps
from rae_scale.cli.bench_options import Against, Repeats, Small
from rae_scale.cli.options import Device

if TYPE_CHECKING:
    import torch

    from rae_scale.bench.reports import Report

app = typer.Typer(no_args_is_help=True, help="Measure on this machine: operations, training steps and the rest.")
Files = Annotated[Path | None, typer.Option("--out", help="Folder for the results as JSON and markdown.")]


@app.command("kernels")
def kernels(
    tokens: Annotated[int, typer.Option(min=1)] = 16384,
    hidden: Annotated[int, typer.Option(min=8)] = 2048,
    head_dim: Annotated[int, typer.Option(min=8)] = 64,
    against: Against = None,
    only: Annotated[list[str] | None, typer.Option(help="Operations to run; repeat for more. Default: all.")] = None,
    repeats: Repeats = 30,
    small: Small = False,
    out: Files = None,
    device: Device = "auto",
) -> None:
    """Errors, reproducibility and bandwidth of every memory-bound operation, forward and backward."""
    from rae_scale.bench.reports import bench_kernels

    found = bench_kernels(
        chosen_device(device),
        tokens=tokens,
        hidden=hidden,
        head_dim=head_dim,
        against=[each.value for each in against or ()],
        only=only or (),
        repeats=repeats,
        small=small,
    )
    show(found, out)


@app.command("attention")
def attention(
    shape: Annotated[
        list[str] | None, typer.Option(metavar="HEADSxDIM", help="Repeat for more. Default: of every published DiT.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Per image; repeat. Default: 256 to 4096.")] = None,
    total_tokens: Annotated[int, typer.Option(min=1, help="Of all images of a batch.")] = 16384,
    repeats: Repeats = 20,
    out: Files = None,
    device: Device = "auto",
) -> None:
    """Every backend of scaled_dot_product_attention, forward and backward."""
    from rae_scale.bench.attention import PUBLISHED_LENGTHS, PUBLISHED_SHAPES
    from rae_scale.bench.reports import bench_attention

    shapes = [heads_and_dim(text) for text in shape] if shape else PUBLISHED_SHAPES
    found = bench_attention(
        chosen_device(device),
        shapes=shapes,
        lengths=tokens or PUBLISHED_LENGTHS,
        total_tokens=total_tokens,
        repeats=repeats,
    )
    show(found, out)


app.command("step")(bench_steps.step)
app.command("scaling")(bench_steps.scaling)
app.command("data")(bench_parts.data)
app.command("data-build")(bench_build.data_build)
app.command("comm")(bench_parts.comm)
app.command("checkpoint")(bench_parts.checkpoint)
app.command("sample")(bench_parts.sample)


def heads_and_dim(text: str) -> tuple[int, int]:
    heads, _, dim = text.partition("x")
    if not (heads.isdecimal() and dim.isdecimal() and int(heads) and int(dim)):
        raise ValueError(f"--shape={text!r}: write heads and head dimension as 32x64")
    return int(heads), int(dim)


def chosen_device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, but PyTorch sees no GPU; use --device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def show(found: Report, out: Path | None) -> None:
    print(found.text)
    if out is not None:
        found.write(out)
        print(f"\nresults: {out}")
