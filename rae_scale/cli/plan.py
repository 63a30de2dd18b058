"""`rae-scale plan`."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rae_scale.config import Config
    from rae_scale.plan.hardware import Calibration, Cluster, Rates
    from rae_scale.plan.samples import Samples

DEFAULT_GPU = "h100-80g"


def plan(
    config_path: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A run file, such as configs/run/pretrain-2.4b.yaml.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many; default: as many as CONFIG has ranks.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help=f"Which kind, such as h200; default: the calibration's, or {DEFAULT_GPU}.")
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="What joins nodes, such as ib-ndr-400; default: what such nodes usually have.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Default: as many as such nodes have.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="In place of data.micro_batch_size.")] = None,
    text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a sample, image slots included; default: an ordinary caption's.")
    ] = None,
    loader_rate: Annotated[
        float | None, typer.Option(min=0.001, help="Images/s that a node's host decodes; default: no limit.")
    ] = None,
    storage: Annotated[float, typer.Option(min=0.001, help="GB/s that all ranks write checkpoints with.")] = 10.0,
    calibration: Annotated[Path | None, typer.Option(help="Rates that --calibrate measured.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Rank layouts for the GPUs; say what will not do.")] = False,
    top: Annotated[int, typer.Option(min=1, help="How many of them.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, without rounding.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for report and JSON, and a picture of the memory.")] = None,
    scaling: Annotated[
        Path | None,
        typer.Option(help="Predict how the published models scale, to this folder and .md; without a CONFIG."),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Measure this machine, or those of a launcher, to this file; without a CONFIG.")
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="Calibrate with tiny sizes: only to see it run.")] = False,
) -> None:
    """What CONFIG needs of memory, network and time, before it is launched.

    A prediction: it says which rates it takes for granted. See docs/planning.md.
    """
    if calibrate is not None:
        measure(calibrate, small)
        return
    if config_path is None and scaling is None:
        raise ValueError("nothing to plan: give a CONFIG, or --scaling FOLDER, or --calibrate FILE")
    with fewer_pauses():
        from rae_scale.plan.hardware import DEFAULT_RATES, find_cluster, load_calibration

        measured = None if calibration is None else load_calibration(calibration)
        rates = DEFAULT_RATES if measured is None else measured.rates
        if scaling is not None:
            predict_scaling(scaling, gpu or DEFAULT_GPU, rates)
            return
        from rae_scale.config import load_config
        from rae_scale.plan.light import without_compiler

        assert config_path is not None
        given = [*(overrides or ()), *([f"data.micro_batch_size={micro_batch}"] if micro_batch else [])]
        config = load_config(config_path, given)
        ranks = config.parallel.world_size
        gpus = gpus or ranks
        if gpus != ranks and not search:
            raise ValueError(
                f"--gpus={gpus}, but parallel.* of {config_path} makes {ranks} ranks; give parallel.* sizes whose "
                f"product is {gpus}, or let --search choose them"
            )
        if measured is None or gpu is not None:
            cluster = find_cluster(gpu or DEFAULT_GPU, gpus, network, gpus_per_node)
        else:
            cluster = calibrated_cluster(measured, gpus, network, gpus_per_node)
        with without_compiler():
            options = {"samples": samples_of(config, text_tokens), "loader_rate": loader_rate}
            if search:
                rank_layouts(config, cluster, rates, top, options, as_json, out)
            else:
                plan_one(config, cluster, rates, storage, options, as_json, out)


@contextmanager
def fewer_pauses() -> Iterator[None]:
    """Without collecting garbage: of what planning imports and makes, most lives to the end, and looking through it
    again and again takes a third of the time; once more than that, when Python ends."""
    enabled = gc.isenabled()
    gc.disable()
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def samples_of(config: Config, text_tokens: int | None) -> Samples:
    from dataclasses import replace

    from rae_scale.plan.samples import usual_samples

    usual = usual_samples(config)
    return usual if text_tokens is None else replace(usual, tokens=text_tokens)


def calibrated_cluster(measured: Calibration, gpus: int, network: str | None, gpus_per_node: int | None) -> Cluster:
    """Of the GPU that was measured, and of the network if there was one and no other is named."""
    from rae_scale.plan.hardware import NETWORKS, Cluster, named, usual_network

    joined = measured.network
    if network is not None or joined is None:
        joined = named("network", network or usual_network(measured.gpu), NETWORKS)
    return Cluster(measured.gpu, joined, gpus, gpus_per_node or min(measured.gpu.node_gpus, gpus))


def plan_one(
    config: Config,
    cluster: Cluster,
    rates: Rates,
    storage: float,
    options: dict[str, Any],
    as_json: bool,
    out: Path | None,
) -> None:
    from rae_scale.plan.duration import Reliability
    from rae_scale.plan.plan import make_plan
    from rae_scale.plan.report import report

    found = make_plan(config, cluster, rates, reliability=Reliability(storage=storage * 1e9), **options)
    show("plan", report(found), found.to_json(), as_json, out)
    if out is not None:
        from rae_scale.plan.chart import memory_chart

        memory_chart(found, out / "memory.png")


def rank_layouts(
    config: Config,
    cluster: Cluster,
    rates: Rates,
    top: int,
    options: dict[str, Any],
    as_json: bool,
    out: Path | None,
) -> None:
    from rae_scale.plan.report import search_json, search_report
    from rae_scale.plan.search import search

    found = search(config, cluster, rates, top=top, **options)
    show("search", search_report(found), search_json(found), as_json, out)


def show(name: str, text: str, data: dict[str, Any], as_json: bool, out: Path | None) -> None:
    """Print the report or the data; with a folder, write both there."""
    import json

    print(json.dumps(data, indent=1) if as_json else text)
    if out is not None:
        from rae_scale.bench.results import write_json

        write_json(out / f"{name}.json", data)
        (out / f"{name}.txt").write_text(text + "\n", encoding="utf-8")


def predict_scaling(folder: Path, gpu: str, rates: Rates) -> None:
    from rae_scale.plan.light import without_compiler
    from rae_scale.plan.scaling import plan_scaling
    from rae_scale.plan.scaling_report import write_scaling

    with without_compiler():
        points = list(plan_scaling(gpu, rates))
    text = write_scaling(points, folder, gpu, rates)
    print(f"{text}: {len(points)} predictions, plots in {folder}")


def measure(file: Path, small: bool) -> None:
    """Every process measures; the first one writes."""
    import os

    import torch

    from rae_scale.bench.machine import environment
    from rae_scale.bench.results import write_json
    from rae_scale.plan.calibrate import TINY, calibrate, content, report

    found, fits = calibrate(sizes=TINY if small else None)
    if os.environ.get("RANK", "0") == "0":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        write_json(file, content(found, fits, environment(device)))
        print(report(found, fits))
        print(f"written to {file}")
