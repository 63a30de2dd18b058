"""`rae-scale bench step` and `rae-scale bench scaling`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rae_scale.cli.bench_options import (
    LLM,
    THRESHOLD,
    Against,
    Baseline,
    Fail,
    Model,
    Note,
    Out,
    Repeats,
    Reporting,
    Settings,
    Small,
    Sweep,
    TextTokens,
    Threshold,
    WarmUp,
    WithLLM,
    config_of_setup,
    session_for,
)
from rae_scale.cli.options import Device

Tokens = Annotated[int | None, typer.Option(min=1, help="Per image, a square; default: the model's.")]


def step(
    overrides: Settings = None,
    model: Model = "dit-2.4b",
    batch: Annotated[int, typer.Option(min=1, help="Images per step, over all ranks and micro-batches.")] = 64,
    tokens: Tokens = None,
    with_llm: WithLLM = False,
    llm: LLM = "qwen2.5-1.5b",
    text_tokens: TextTokens = 128,
    sweep: Sweep = None,
    against: Against = None,
    find_micro_batch: Annotated[
        bool, typer.Option("--find-micro-batch", help="Also find the largest micro-batch that fits.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also where the time goes; needs --out.")] = False,
    peak_tflops: Annotated[float | None, typer.Option(help="Dense bf16 peak of a GPU that is not listed.")] = None,
    repeats: Repeats = 10,
    warm_up: WarmUp = 3,
    small: Small = False,
    out: Out = None,
    note: Note = "",
    baseline: Baseline = None,
    threshold: Threshold = THRESHOLD,
    fail_on_regression: Fail = False,
    device: Device = "auto",
) -> None:
    """A training step on random data: forward, backward and optimizer of the DiT, alone or with its language model.

    On several ranks, start it with torchrun and say in parallel.* how they lie.
    """
    from rae_scale.bench.harness import sweep_points
    from rae_scale.bench.setup import StepSetup
    from rae_scale.bench.step_report import STEP, bench_step

    if profile and out is None:
        raise ValueError("--profile writes a trace: say where with --out FOLDER")
    reporting = Reporting(STEP, out, baseline, threshold, fail_on_regression, note)
    setup = StepSetup(model, batch, tokens, with_llm, llm, text_tokens, tuple(overrides or ()))
    points = sweep_points(sweep or [])
    with session_for(points, config_of_setup(setup), device) as session:
        record = bench_step(
            setup,
            session,
            points,
            against=[each.value for each in against or ()],
            repeats=repeats,
            warm_up=warm_up,
            peak_tflops=peak_tflops,
            find_micro_batch=find_micro_batch,
            trace=out / "trace.json" if profile and out is not None else None,
            small=small,
            after_row=reporting.after_row,
        )
        reporting.finish(record, session)


def scaling(
    overrides: Settings = None,
    model: Model = "dit-2.4b",
    batch: Annotated[
        int, typer.Option(min=1, help="Images per step: of each rank (weak), of all together (strong).")
    ] = 64,
    tokens: Tokens = None,
    with_llm: WithLLM = False,
    llm: LLM = "qwen2.5-1.5b",
    text_tokens: TextTokens = 128,
    ranks: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Default: 1, 2, 4, ... up to the GPUs of this machine.")
    ] = None,
    mode: Annotated[Literal["weak", "strong", "both"], typer.Option()] = "both",
    axis: Annotated[
        Literal["dp_replicate", "dp_shard", "sp", "tp"], typer.Option(help="Which size of parallel.* grows.")
    ] = "dp_shard",
    sweep: Sweep = None,
    repeats: Repeats = 10,
    warm_up: WarmUp = 3,
    out: Out = None,
    note: Note = "",
    baseline: Baseline = None,
    threshold: Threshold = THRESHOLD,
    fail_on_regression: Fail = False,
    device: Device = "auto",
) -> None:
    """`bench step` on 1, 2, 4, ... ranks of this machine, which are started here. The engine is FSDP2 unless
    engine.name says otherwise.
    """
    import torch

    from rae_scale.bench.harness import sweep_points
    from rae_scale.bench.scaling import MODES, SCALING, bench_scaling
    from rae_scale.bench.session import open_session
    from rae_scale.bench.setup import StepSetup

    reporting = Reporting(SCALING, out, baseline, threshold, fail_on_regression, note)
    chosen = ("engine.name=fsdp2", *(overrides or ()))
    setup = StepSetup(model, batch, tokens, with_llm, llm, text_tokens, chosen)
    # This process starts the ranks and is none of them.
    with open_session([], device) as session:
        most = torch.cuda.device_count() if session.device.type == "cuda" else 2
        record = bench_scaling(
            setup,
            session,
            sweep_points(sweep or []),
            ranks=numbers(ranks) if ranks else [2**n for n in range(most.bit_length())],
            modes=MODES if mode == "both" else [mode],
            axis=axis,
            step_options=[f"--repeats={repeats}", f"--warm-up={warm_up}"],
            after_row=reporting.after_row,
        )
        reporting.finish(record, session)


def numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"--ranks={text!r}: write numbers of ranks as 1,2,4")
    return sorted({int(part) for part in parts})
