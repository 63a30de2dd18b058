"""`rae-scale bench data`, `comm`, `checkpoint` and `sample`: what surrounds a training step."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rae_scale.cli.bench_options import (
    LLM,
    THRESHOLD,
    Baseline,
    Fail,
    Model,
    Note,
    Out,
    Repeats,
    Reporting,
    Settings,
    Sweep,
    TextTokens,
    Threshold,
    WarmUp,
    WithLLM,
    config_of_setup,
    session_for,
)
from rae_scale.cli.options import Device

if TYPE_CHECKING:
    from rae_scale.bench.collectives import Collective

DEFAULT_PAYLOADS = {"cuda": range(10, 31, 2), "cpu": range(10, 23, 2)}
"""Powers of two."""


def data(
    overrides: Settings = None,
    path: Annotated[
        list[Path] | None, typer.Option(help="Folder of MDS shards; repeat. Default: made pictures.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many of those are made, without --path.")] = 128,
    made_size: Annotated[int, typer.Option(min=32, help="Side of those in pixels.")] = 512,
    image_size: Annotated[int, typer.Option(min=1, help="Side that images are resized to.")] = 256,
    reader: Annotated[
        list[str] | None,
        typer.Option(help="rae-scale, bare loop, streaming, webdataset; repeat. Default: all of them."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 32,
    starts: Annotated[int, typer.Option(min=1, help="How often the loader is started.")] = 2,
    index_samples: Annotated[
        int, typer.Option(min=0, help="Also open an index of so many samples without images, for example 73000000.")
    ] = 0,
    sweep: Sweep = None,
    repeats: Repeats = 20,
    out: Out = None,
    note: Note = "",
    baseline: Baseline = None,
    threshold: Threshold = THRESHOLD,
    fail_on_regression: Fail = False,
) -> None:
    """Images/s of the data path beside a bare loop of decoding and resizing, mosaicml's StreamingDataset and
    webdataset, for example with --sweep data.num_workers=0,1,2,4. With model.llm.tokenizer=FOLDER captions are
    tokenised as in pretraining.
    """
    from rae_scale.bench.data import DATA, READERS, bench_data
    from rae_scale.bench.data_pictures import make_shards
    from rae_scale.bench.harness import Base, sweep_points
    from rae_scale.bench.session import open_session

    reporting = Reporting(DATA, out, baseline, threshold, fail_on_regression, note)
    with tempfile.TemporaryDirectory(prefix="rae-scale-bench-") as scratch:
        folders = path or [make_shards(Path(scratch), images, made_size)]
        sources = [{"path": str(folder)} for folder in folders]
        tree = {"data": {"sources": sources, "global_batch_size": batch}}
        with open_session([], "cpu") as session:
            record = bench_data(
                Base(tree, tuple(overrides or ()), "bench data"),
                session,
                sweep_points(sweep or []),
                image_size=image_size,
                repeats=repeats,
                starts=starts,
                only=reader or READERS,
                index_samples=index_samples,
                after_row=reporting.after_row,
            )
            reporting.finish(record, session)


def comm(
    overrides: Settings = None,
    payload: Annotated[
        list[int] | None, typer.Option(min=1, help="Bytes; repeat. Default: 1 KiB to 1 GiB (CPU: 4 MiB) by fours.")
    ] = None,
    group: Annotated[list[str] | None, typer.Option(help="dp, sp, tp, ...; repeat. Default: all there are.")] = None,
    collective: Annotated[
        list[str] | None,
        typer.Option(help="all_gather, reduce_scatter, all_reduce, all_to_all; repeat. Default: all."),
    ] = None,
    traffic: Annotated[
        bool, typer.Option("--traffic", help="Also what a step of --model sends, and how long that takes.")
    ] = False,
    model: Model = "dit-2.4b",
    batch: Annotated[int, typer.Option(min=1, help="Images of that step, over all ranks.")] = 64,
    with_llm: WithLLM = False,
    llm: LLM = "qwen2.5-1.5b",
    text_tokens: TextTokens = 128,
    sweep: Sweep = None,
    repeats: Repeats = 20,
    warm_up: WarmUp = 5,
    out: Out = None,
    note: Note = "",
    baseline: Baseline = None,
    threshold: Threshold = THRESHOLD,
    fail_on_regression: Fail = False,
    device: Device = "auto",
) -> None:
    """Time and bandwidth of collectives over the groups of parallel.*; start it with torchrun on as many ranks."""
    from rae_scale.bench.collectives import COLLECTIVES
    from rae_scale.bench.comm import COMM, bench_comm
    from rae_scale.bench.harness import sweep_points
    from rae_scale.bench.setup import StepSetup

    reporting = Reporting(COMM, out, baseline, threshold, fail_on_regression, note)
    chosen: list[Collective] = []
    for name in collective or COLLECTIVES:
        found = next((kind for kind in COLLECTIVES if kind == name), None)
        if found is None:
            raise ValueError(f"--collective={name!r}: choose from {', '.join(COLLECTIVES)}")
        chosen.append(found)
    # The engine only matters to --traffic, but one process's engine would refuse several ranks.
    settings = ("engine.name=fsdp2", *(overrides or ()))
    setup = StepSetup(model, batch, None, with_llm, llm, text_tokens, settings)
    points = sweep_points(sweep or [])
    with session_for(points, config_of_setup(setup), device) as session:
        record = bench_comm(
            setup,
            session,
            points,
            payloads=payload or [2**power for power in DEFAULT_PAYLOADS[session.device.type]],
            groups=group or (),
            collectives=chosen,
            traffic=traffic,
            repeats=repeats,
            warm_up=warm_up,
            after_row=reporting.after_row,
        )
        reporting.finish(record, session)


def checkpoint(
    overrides: Settings = None,
    model: Model = "dit-2.4b",
    with_llm: WithLLM = False,
    llm: LLM = "qwen2.5-1.5b",
    folder: Annotated[
        Path, typer.Option(help="Where to write and read, on the file system in question; left as it was.")
    ] = Path("."),
    files: Annotated[int, typer.Option(min=1, help="Files that resharding writes.")] = 4,
    sweep: Sweep = None,
    repeats: Repeats = 3,
    out: Out = None,
    note: Note = "",
    baseline: Baseline = None,
    threshold: Threshold = THRESHOLD,
    fail_on_regression: Fail = False,
    device: Device = "auto",
) -> None:
    """Save (within a step, and beside training), load, verify and reshard, beside a plain write of the same bytes.

    On several ranks, start it with torchrun and say in parallel.* how they lie.
    """
    from rae_scale.bench.checkpoint import CHECKPOINT, bench_checkpoint
    from rae_scale.bench.harness import sweep_points
    from rae_scale.bench.setup import StepSetup

    reporting = Reporting(CHECKPOINT, out, baseline, threshold, fail_on_regression, note)
    # One image for every rank that has its own: as much as it takes to make a step.
    setup = StepSetup(model, 1, None, with_llm, llm, 16, tuple(overrides or ()))
    points = sweep_points(sweep or [])
    with session_for(points, config_of_setup(setup), device) as session:
        record = bench_checkpoint(
            setup,
            session,
            points,
            folder=folder,
            files=files,
            repeats=repeats,
            after_row=reporting.after_row,
        )
        reporting.finish(record, session)


def sample(
    overrides: Settings = None,
    model: Model = "dit-2.4b",
    llm: LLM = "qwen2.5-1.5b",
    decoder: Annotated[str, typer.Option(help="A named decoder.")] = "vit-xl",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Run, checkpoint or export to draw with. Default: random weights.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures made at once.")] = 16,
    text_tokens: TextTokens = 64,
    sweep: Sweep = None,
    repeats: Repeats = 5,
    warm_up: WarmUp = 1,
    out: Out = None,
    note: Note = "",
    baseline: Baseline = None,
    threshold: Threshold = THRESHOLD,
    fail_on_regression: Fail = False,
    device: Device = "auto",
) -> None:
    """Text to image: latents, decoding, and both, for example with --sweep data.global_batch_size=1,16
    --sweep sampler.steps=10,50 --sweep sampler.guidance=1,3. With --checkpoint its own models are used.
    """
    from rae_scale.bench.harness import Base, sweep_points
    from rae_scale.bench.sample import PROMPT, SAMPLE, LoadedDrawer, bench_sample, random_drawer
    from rae_scale.bench.session import open_session

    reporting = Reporting(SAMPLE, out, baseline, threshold, fail_on_regression, note)
    with open_session([], device) as session:
        loaded = LoadedDrawer(checkpoint, session.device) if checkpoint is not None else None
        named = {"name": model, "llm": {"name": llm}, "decoder": {"name": decoder}}
        tree = loaded.tree() if loaded is not None else {"model": named}
        given = (f"data.global_batch_size={batch}", *(overrides or ()))
        record = bench_sample(
            Base(tree, given, "bench sample"),
            loaded or partial(random_drawer, device=session.device, text_tokens=text_tokens),
            session,
            sweep_points(sweep or []),
            weights=f"random, {text_tokens} text tokens" if loaded is None else f"loaded, {PROMPT!r}",
            repeats=repeats,
            warm_up=warm_up,
            after_row=reporting.after_row,
        )
        reporting.finish(record, session)
