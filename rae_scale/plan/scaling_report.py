"""Predicted scaling as a document: tables, plots, and what was taken for granted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rae_scale.bench.results import table, write_json
from rae_scale.models.parallel_limits import parallel_problems
from rae_scale.plan.chart import scaling_chart
from rae_scale.plan.hardware import NETWORKS, Rates
from rae_scale.plan.models import generator, language_model
from rae_scale.plan.report import GIB
from rae_scale.plan.scaling import (
    BATCH,
    IMAGES_PER_GPU,
    LOST,
    MODES,
    Point,
    breaks_first,
    by_series,
    efficiencies,
    published,
)
from rae_scale.plan.search import divisors
from rae_scale.plan.traffic import local_batch


def limits_of(model: str) -> dict[str, Any]:
    """The largest splits that a model allows, and the numbers of GPUs that they allow."""
    config = published(model)
    dit, llm = generator(config), language_model(config)

    def allowed(tp: int, sp: int) -> bool:
        return not parallel_problems(dit, llm, tp=tp, sp=sp)

    sizes = divisors(dit.num_heads)
    both = max(tp * sp for tp in sizes for sp in sizes if allowed(tp, sp))
    return {
        "model": model,
        "dit": dit.num_heads,
        "llm": llm.num_attention_heads,
        "kv": llm.num_key_value_heads,
        "tp": max(tp for tp in sizes if allowed(tp, 1)),
        "sp": max(sp for sp in sizes if allowed(1, sp)),
        "both": both,
        "gpus": BATCH * both,
    }


LIMITS = {
    "model": "{model}",
    "heads of DiT / LLM / keys and values": "{dit} / {llm} / {kv}",
    "largest tp": "{tp}",
    "largest sp": "{sp}",
    "largest tp x sp": "{both}",
    f"most GPUs for a batch of {BATCH:,}": "{gpus:,}",
}
COLUMNS = {
    "GPUs": "{gpus:,}",
    "batch": "{batch:,}",
    "replicate x shard x sp x tp": "{layout}",
    "micro-batch": "{micro_batch} of {local}",
    "checkpointing": "{checkpointing}",
    "GiB": "{gib:.1f}",
    "step s": "{step_s:.3f}",
    "images/s": "{images_per_s:,.0f}",
    "efficiency": "{efficiency:.0%}",
    "MFU": "{mfu:.1%}",
    "communication not hidden": "{exposed:.1%}",
    "": "{reason}",
}


def rows_of(points: Sequence[Point]) -> list[Mapping[str, Any]]:
    """Of one series, for its table."""
    reached = efficiencies(points)
    rows: list[Mapping[str, Any]] = []
    for point in points:
        row = point.to_json()
        if point.found is not None:
            row |= {
                "layout": " x ".join(str(size) for size in row["parallel"].values()),
                "local": local_batch(point.found.config),
                "gib": row["memory_bytes"] / GIB,
                "efficiency": reached[point.gpus],
            }
        rows.append(row)
    return rows


def to_markdown(points: Sequence[Point], gpu: str, rates: Rates, pictures: str) -> str:
    """pictures: folder of the plots, as the text names it."""
    series = by_series(points)
    models, networks = (list(dict.fromkeys(key[place] for key in series)) for place in (0, 2))
    lines = [
        "# Predicted scaling of the published models",
        "",
        f"**These are predictions, not measurements.** They come from `rae-scale plan --scaling`, for nodes of 8 {gpu} "
        f"joined by {' or by '.join(networks)}, with rates from {rates.source}.",
        "",
        "## Assumptions",
        "",
        *(f"- {line}" for line in assumptions(gpu, rates, networks)),
        "",
        *(f"![{mode} scaling]({pictures}/{mode}.png)\n" for mode in MODES),
        "## What breaks first",
        "",
        f"The first number of GPUs at which efficiency has fallen by {LOST:.0%} or more, and the part of the step of "
        "which an image costs most GPU time more than at the start.",
        "",
        table(
            [
                {"model": key[0], "mode": key[1], "network": key[2], "words": breaks_first(found)}
                for key, found in series.items()
            ],
            {"model": "{model}", "scaling": "{mode}", "network": "{network}", "what breaks first": "{words}"},
        ),
        "",
        "## Limits of the models",
        "",
        "Tensor parallel layers need whole heads, keys and values included; sequence parallel ranks need as many whole "
        "heads each. Beyond the last column, a data-parallel rank would have less than one image.",
        "",
        table([limits_of(model) for model in models], LIMITS),
    ]
    for (model, mode, network), found in series.items():
        lines += ["", f"## {model}, {mode}, {network}", "", table(rows_of(found), COLUMNS)]
    return "\n".join(lines) + "\n"


def assumptions(gpu: str, rates: Rates, networks: Sequence[str]) -> Iterator[str]:
    yield (
        f"Weak scaling: {IMAGES_PER_GPU} images per GPU. Strong scaling: {BATCH:,} images per step, the paper's batch. "
        "Whether a larger batch trains as well is another question."
    )
    yield (
        "At each point: the fastest layout that fits, of FSDP2 with every split into replicas, shards, sequence and "
        "tensor parallel ranks (the last two within a node), every micro-batch, and activation checkpointing none, "
        "selective or full. No offloading, no 8-bit products, no torch.compile."
    )
    yield "Captions of 64 tokens beside template and image; the language model trains; the encoder runs in every step."
    yield f"A run fits if its tensors and a margin fit into the {gpu}; data loading never limits."
    for name in networks:
        network = NETWORKS[name]
        yield (
            f"{name}: {network.rate / 1e9:g} GB/s per GPU and direction, of which {rates.network:.0%} is reached. No "
            "other traffic, no slow node, no congestion: real fabrics of many nodes have all of these."
        )
    yield (
        f"Of the peaks, {rates.matmul:.0%} in products, {rates.attention:.0%} in attention, {rates.memory:.0%} of the "
        f"memory bandwidth; {rates.overlap:.0%} of forward and backward can hide communication."
    )
    yield "How the parts of a step are estimated is in [planning.md](planning.md)."


def write_scaling(points: Sequence[Point], folder: Path, gpu: str, rates: Rates) -> Path:
    """Plots and numbers to `folder`, the text to the file of its name beside it, which is returned: docs/scaling.md
    for docs/scaling."""
    series = by_series(points)
    write_json(folder / "scaling.json", [point.to_json() for point in points])
    networks = list(dict.fromkeys(point.network for point in points))
    for mode in MODES:
        panels = {
            network: {
                model: list(efficiencies(found).items())
                for (model, its_mode, its_network), found in series.items()
                if (its_mode, its_network) == (mode, network)
            }
            for network in networks
        }
        title = f"{mode} scaling on {gpu}: predicted, not measured"
        scaling_chart(panels, "efficiency", title, folder / f"{mode}.png")
    text = folder.with_name(f"{folder.name}.md")
    text.write_text(to_markdown(points, gpu, rates, folder.name), encoding="utf-8")
    return text
