"""`rae-scale eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rae_scale.cli.options import BatchSize, DecoderFolder, Device, Guidance, Method, Steps, Weights

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:  # without it, typer would make the one command the group itself
    """Score generated pictures."""


@app.command()
def shapes(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Run folder (its newest checkpoint), checkpoint, or export.")
    ] = None,
    instrument: Annotated[
        bool, typer.Option("--instrument", help="Measure the checker itself on known pictures; needs no checkpoint.")
    ] = False,
    prompts_per_task: Annotated[int, typer.Option(min=2)] = 100,
    samples_per_prompt: Annotated[int, typer.Option(min=1)] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Decides the prompts and the pictures' noise.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write pictures and results here (new folder).")
    ] = None,
    batch_size: BatchSize = 64,
    weights: Weights = None,
    steps: Steps = None,
    guidance: Guidance = None,
    method: Method = None,
    decoder: DecoderFolder = None,
    device: Device = "auto",
) -> None:
    """The shapes score of a model.

    Six GenEval-style tasks, judged by an exact checker, beside what chance and a perfect model score.
    """
    if instrument:
        if checkpoint is not None or out is not None:
            raise ValueError("--instrument measures the checker alone: give no CHECKPOINT and no --out with it")
        from rae_scale.data.shapes.instrument import measure_instrument

        print(measure_instrument(prompts_per_task, seed).table())
        return
    if checkpoint is None:
        raise ValueError("nothing to score: give a CHECKPOINT, or --instrument to measure the checker itself")

    from rae_scale.data.shapes.world import WorldConfig
    from rae_scale.evals.shapes import evaluate
    from rae_scale.infer.pipeline import TextToImage

    pipeline = TextToImage.from_checkpoint(checkpoint, weights=weights, decoder=decoder, device=device)
    sampler = pipeline.sampler(steps=steps, guidance=guidance, method=method)
    report = evaluate(
        lambda prompts, seeds: pipeline.generate(prompts, seeds, sampler, batch_size=batch_size),
        prompts_per_task,
        samples_per_prompt,
        seed,
        batch_size,
        WorldConfig(size=pipeline.image_size),
        out,
    )
    print(report.table())
    if out is not None:
        print(f"pictures and results: {out}")
