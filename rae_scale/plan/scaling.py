"""How the published models are predicted to scale from one node to many: the fastest layout that fits, point by point.

Weak scaling keeps the images per GPU, strong scaling those of the whole step. Efficiency is images/s per GPU over that
of the smallest number of GPUs on which the model fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rae_scale.bench.results import table, write_json
from rae_scale.config import Config
from rae_scale.models.parallel_limits import parallel_problems
from rae_scale.plan.chart import scaling_chart
from rae_scale.plan.hardware import DEFAULT_RATES, NETWORKS, Rates, find_cluster
from rae_scale.plan.models import generator, language_model
from rae_scale.plan.report import GIB
from rae_scale.plan.search import Found, Space, divisors, search
from rae_scale.plan.step_time import StepTime
from rae_scale.plan.traffic import local_batch, micro_batch_of

Mode = Literal["weak", "strong"]
MODES: tuple[Mode, ...] = get_args(Mode)
MODELS = {
    "DiT 0.5B": ("dit-0.5b", "qwen2.5-1.5b"),
    "DiT 2.4B": ("dit-2.4b", "qwen2.5-1.5b"),
    "DiT 3.1B": ("dit-3.1b", "qwen2.5-1.5b"),
    "DiT 5.5B": ("dit-5.5b", "qwen2.5-1.5b"),
    "DiT 9.8B": ("dit-9.8b", "qwen2.5-1.5b"),
    "DiT 9.8B, Qwen2.5 7B": ("dit-9.8b", "qwen2.5-7b"),
}
"""The released sizes (paper table 10), with Qwen2.5 1.5B unless it says otherwise."""
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
TWO_NETWORKS = ("ib-ndr-400", "ethernet-100")
BATCH, IMAGES_PER_GPU = 2048, 32
"""The paper's global batch, and what each of 64 GPUs has of it."""
FAMILY = Space(engines=("fsdp2",), offload=(False,), local_only=True)
"""What is searched at each point: FSDP2 with every split, tensor and sequence parallel groups within a node."""
LOST = 0.2
"""Of the efficiency, at which a model counts as no longer scaling."""


@dataclass(frozen=True)
class Point:
    """found: None if nothing fits; then `reason` says why. efficiency: None without a smaller point to compare with."""

    model: str
    mode: Mode
    network: str
    gpus: int
    batch: int
    found: Found | None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        plain = {
            "model": self.model,
            "mode": self.mode,
            "network": self.network,
            "gpus": self.gpus,
            "batch": self.batch,
        }
        if self.found is None:
            return plain | {"fits": False, "reason": self.reason}
        step, config, memory = self.found.step, self.found.config, self.found.memory
        return plain | {
            "fits": True,
            "parallel": config.parallel.model_dump(),
            "micro_batch": micro_batch_of(config),
            "checkpointing": config.engine.activation_checkpointing,
            "step_s": step.seconds,
            "parts_s": dict(step.parts),
            "images_per_s": step.images_per_s,
            "mfu": step.mfu,
            "exposed": step.exposed / step.seconds,
            "memory_bytes": memory.peak + memory.margin,
        }


def plan_scaling(
    gpu: str = "h100-80g",
    rates: Rates = DEFAULT_RATES,
    *,
    models: Sequence[str] = tuple(MODELS),
    counts: Sequence[int] = COUNTS,
    networks: Sequence[str] = TWO_NETWORKS,
) -> Iterator[Point]:
    """The points in the order of models, modes, networks and numbers of GPUs.

    Raises:
        ValueError: unknown names.
    """
    for model in models:
        for mode in MODES:
            for network in networks:
                for gpus in counts:
                    yield plan_point(model, mode, network, gpus, gpu, rates)


def plan_point(model: str, mode: Mode, network: str, gpus: int, gpu: str, rates: Rates) -> Point:
    cluster = find_cluster(gpu, gpus, network)
    batch = IMAGES_PER_GPU * gpus if mode == "weak" else BATCH
    result = search(published(model, batch), cluster, rates, top=1, space=FAMILY)
    found = result.fits[0] if result.fits else None
    return Point(model, mode, network, gpus, batch, found, result.refused[0].reason if result.refused else "")


def published(model: str, batch: int = BATCH) -> Config:
    """The recipe of pre-training, which the schema's defaults are."""
    name, llm = MODELS[model]
    sections = {"model": {"name": name, "llm": {"name": llm}}, "engine": {"name": "fsdp2"}}
    return Config.model_validate({**sections, "data": {"global_batch_size": batch}})


Series = tuple[str, Mode, str]


def by_series(points: Sequence[Point]) -> dict[Series, list[Point]]:
    """Model, mode and network -> points with rising numbers of GPUs."""
    series: dict[Series, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.gpus):
        series.setdefault((point.model, point.mode, point.network), []).append(point)
    return series


def efficiencies(points: Sequence[Point]) -> dict[int, float]:
    """Of one series: GPUs -> images/s per GPU over that of the first point that fits."""
    steps = {point.gpus: point.found.step for point in points if point.found is not None}
    base = next(iter(steps.values()), None)
    return {gpus: step.images_per_s_per_gpu / base.images_per_s_per_gpu for gpus, step in steps.items() if base}


def gpu_seconds(step: StepTime) -> dict[str, float]:
    """What an image costs, by part."""
    return {name: seconds * step.gpus / step.images for name, seconds in step.parts.items()}


def breaks_first(points: Sequence[Point]) -> str:
    """What of one series stops scaling first, and where; in words."""
    found = {point.gpus: point for point in points if point.found is not None}
    for gpus, efficiency in efficiencies(points).items():
        if efficiency > 1 - LOST:
            continue
        first, point = next(iter(found.values())), found[gpus]
        assert first.found is not None and point.found is not None
        before, after = gpu_seconds(first.found.step), gpu_seconds(point.found.step)
        part = max(after, key=lambda name: after[name] - before.get(name, 0.0))
        share = point.found.step.parts[part] / point.found.step.seconds
        local = point.batch / gpus
        return f"{gpus:,} GPUs: efficiency {efficiency:.0%}, {part} {share:.0%} of the step, {local:g} images per GPU"
    return f"nothing up to {max(found):,} GPUs" if found else "it fits nowhere"


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
