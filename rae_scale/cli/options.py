"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Weights = Annotated[
    Literal["ema", "raw"] | None, typer.Option(help="Which weights; default: EMA where the checkpoint has them.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampler steps; default: sampler.steps of the run.")]
Guidance = Annotated[float | None, typer.Option(min=0, help="Guidance scale; default: sampler.guidance of the run.")]
Method = Annotated[Literal["euler", "heun"] | None, typer.Option(help="Default: sampler.method of the run.")]
DecoderFolder = Annotated[Path | None, typer.Option("--decoder", help="Decoder weights; default: those of the run.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures made at once.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option()]
