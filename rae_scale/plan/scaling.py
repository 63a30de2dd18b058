"""How the published models are predicted to scale from one node to many: the fastest layout that fits, point by point.

Weak scaling keeps the images per GPU, strong scaling those of the whole step. Efficiency is images/s per GPU over that
of the smallest number of GPUs on which the model fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rae_scale.config import Config
from rae_scale.plan.hardware import DEFAULT_RATES, Rates, find_cluster
from rae_scale.plan.search import Found, Space, search
from rae_scale.plan.step_time import StepTime
from rae_scale.plan.traffic import micro_batch_of

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
