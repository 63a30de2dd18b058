"""`rae-scale bench`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rae_scale.cli.options import Device

if TYPE_CHECKING:
    import torch

    from rae_scale.bench.reports import Report

app = typer.Typer(no_args_is_help=True, help="Measure operations, attention and training steps on this machine.")


class Alternative(StrEnum):  # typer takes no list of a Literal
    eager = "eager"
    compile = "compile"


Against = Annotated[
    list[Alternative] | None,
    typer.Option(help="Also the reference operations: call by call, or under torch.compile; repeat for both."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the results as JSON and markdown.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed runs; the median and the spread are reported.")]
Small = Annotated[bool, typer.Option("--small", help="Skip measuring the ceilings properly: only to see it run.")]


@app.command("kernels")
def kernels(
    tokens: Annotated[int, typer.Option(min=1)] = 16384,
    hidden: Annotated[int, typer.Option(min=8)] = 2048,
    head_dim: Annotated[int, typer.Option(min=8)] = 64,
    against: Against = None,
    only: Annotated[list[str] | None, typer.Option(help="Operations to run; repeat for more. Default: all.")] = None,
    repeats: Repeats = 30,
    small: Small = False,
    out: Out = None,
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
    out: Out = None,
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


@app.command("step")
def step(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as engine.precision=fp32.")
    ] = None,
    model: Annotated[str, typer.Option(help="A named DiT (`rae-scale model list`).")] = "dit-2.4b",
    batch: Annotated[int, typer.Option(min=1, help="Images per step, in one micro-batch.")] = 64,
    tokens: Annotated[int | None, typer.Option(min=1, help="Per image, a square; default: the model's.")] = None,
    with_llm: Annotated[bool, typer.Option("--with-llm", help="Train the language model too.")] = False,
    llm: Annotated[str, typer.Option(help="A named language model.")] = "qwen2.5-1.5b",
    text_tokens: Annotated[int, typer.Option(min=2, help="Of each caption, with --with-llm.")] = 128,
    against: Against = None,
    find_micro_batch: Annotated[
        bool, typer.Option("--find-micro-batch", help="Also find the largest micro-batch that fits.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also where the time goes; needs --out.")] = False,
    peak_tflops: Annotated[float | None, typer.Option(help="Dense bf16 peak of a GPU that is not listed.")] = None,
    repeats: Repeats = 10,
    small: Small = False,
    out: Out = None,
    device: Device = "auto",
) -> None:
    """A training step on random data: forward, backward and optimizer of the DiT, alone or with its language model."""
    from rae_scale.bench.setup import StepSetup
    from rae_scale.bench.step_report import bench_step

    if profile and out is None:
        raise ValueError("--profile writes a trace: say where with --out FOLDER")
    setup = StepSetup(model, batch, tokens, with_llm, llm, text_tokens, tuple(overrides or ()))
    found = bench_step(
        setup,
        chosen_device(device),
        against=[each.value for each in against or ()],
        repeats=repeats,
        peak_tflops=peak_tflops,
        find_micro_batch=find_micro_batch,
        trace=out / "trace.json" if profile and out is not None else None,
        small=small,
    )
    show(found, out)


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
