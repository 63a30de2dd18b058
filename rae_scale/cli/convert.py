"""`rae-scale convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rae_scale.cli.options import Weights

if TYPE_CHECKING:
    from rae_scale.convert.convert import Report

To = Literal["native", "checkpoint", "official", "official-consolidated", "official-decoder", "hf", "diffusers-decoder"]
DTYPE_HELP = "Of the tensors written; the largest error of the cast is reported."


def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint of any format (the format is recognised), or run folder.")],
    destination: Annotated[Path, typer.Argument(help="New folder.")],
    to: Annotated[
        To,
        typer.Option(
            help="native: weights for run.init_from and `sample`. checkpoint: with optimizer state, to train on. "
            "official: Scale-RAE's release; official-consolidated: the same as one model.pth. official-decoder: RAE's "
            "model.pt. hf: for RaeScale.from_pretrained. diffusers-decoder: AutoencoderRAE."
        ),
    ],
    weights: Weights = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help=DTYPE_HELP)] = "float32",
    verify: Annotated[bool, typer.Option("--verify", help="Read the result back and compare every element.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="Run file with the model's settings, where the source has none.")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="PEFT folder of an adapter to merge into the LLM.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only our names with this beginning, such as dit.; repeat. For native.")
    ] = None,
    decoder: Annotated[
        Path | None, typer.Option(help="The decoder to go with the model, of any format. For hf.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the weights, for the model card. For hf.")] = None,
) -> None:
    """Write a checkpoint in another format. Interrupted, the same command continues where it was."""
    from rae_scale.config import load_config
    from rae_scale.convert.convert import convert as convert_checkpoint
    from rae_scale.infer.load import STATE_KIND

    report = convert_checkpoint(
        source,
        destination,
        to,
        weights=STATE_KIND[weights],
        dtype=dtype,
        verify=verify,
        config=None if config is None else load_config(config),
        lora=lora,
        only=only,
        decoder=decoder,
        license=license,
    )
    print(describe(report))


def describe(report: Report) -> str:
    """What was done, in lines of text."""
    which = "" if report.weights is None else {"ema": ", moving average", "weight": ", raw weights"}[report.weights]
    lines = [
        f"{report.source}{which} -> {report.out}: {report.tensors:,} tensors, {report.bytes / 2**20:,.1f} MiB",
    ]
    absolute, relative = report.casts.absolute, report.casts.relative
    if absolute.tensor:
        lines.append(
            f"  largest error of the cast: {absolute.error:.3g} in {absolute.tensor}; relative to a tensor's largest "
            f"entry {relative.error:.3g} in {relative.tensor}"
        )
    if report.verified is not None:
        lines.append(f"  verified: {report.verified:,} elements read back and equal, bit for bit")
    return "\n".join([*lines, *(f"  note: {remark}" for remark in report.remarks)])
