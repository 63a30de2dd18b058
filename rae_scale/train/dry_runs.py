"""What a run would be: sizes, data and FLOPs per step, without weights, processes or a GPU."""

from __future__ import annotations

import os
from collections import Counter

from torch import nn

from rae_scale.config import Config
from rae_scale.config.paths import resolve_paths
from rae_scale.data.collate import Batch
from rae_scale.data.loader import build_loader, mixture_of, open_sources
from rae_scale.models.zoo import logical_parameters
from rae_scale.train.latents.missing import describe_cache
from rae_scale.train.layout import check_layout
from rae_scale.train.meta import build_parts_on_meta, without_weights
from rae_scale.train.parts import Parts
from rae_scale.train.stages import GenerationStage

PROBE_SAMPLES = 16  # read from the data to see that it fits and how long its texts are


def dry_run(config: Config) -> str:
    """Describe the run that `config` asks for, a line per fact.

    Models are built on the meta device, which holds no weights. The first samples are read and tokenised as in
    training. Raises ValueError for whatever would stop the run before its first step.
    """
    check_layout(config)
    resolved = without_weights(resolve_paths(config))
    parts = build_parts_on_meta(resolved)
    batch = probe(resolved, parts)
    return "\n".join(
        [
            *describe_layout(config),
            *describe_parameters(parts),
            *describe_data(resolved, parts),
            *describe_step(config, parts, batch),
        ]
    )


def probe(config: Config, parts: Parts) -> Batch:
    """A few samples of the run's sources as one batch."""
    size = min(PROBE_SAMPLES, config.data.global_batch_size)
    update = {"global_batch_size": size, "micro_batch_size": None, "num_workers": 0, "lanes": 1}
    loader = build_loader(
        config.data.model_copy(update=update),
        seed=config.run.seed,
        image_size=parts.batches.image_size,
        prepare=parts.batches.prepare,
        collate=parts.batches.collate,
        quarantine_path=os.devnull,
    )
    with loader:
        return next(loader)[0]


def describe_layout(config: Config) -> list[str]:
    parallel, data = config.parallel, config.data
    ranks = parallel.dp_replicate * parallel.dp_shard
    micro = data.micro_batch_size or data.global_batch_size // ranks
    engine = (
        f"{config.engine.name} stage {config.engine.zero_stage}" if config.engine.name == "zero" else config.engine.name
    )
    return [
        f"stage {config.stage}: {config.run.max_steps:,} steps, engine {engine}, {config.engine.precision}",
        f"processes {parallel.world_size} = dp_replicate {parallel.dp_replicate} x dp_shard {parallel.dp_shard} x "
        f"sp {parallel.sp} x tp {parallel.tp}",
        f"global batch {data.global_batch_size:,} = {ranks} ranks x {data.global_batch_size // ranks // micro} "
        f"micro-steps x {micro} samples",
    ]


def describe_parameters(parts: Parts) -> list[str]:
    module = parts.stage.module
    trained: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            trained[parts.stage.group_of(name)] += parameter.numel()
    frozen = sum(parameter.numel() for parameter in module.parameters() if not parameter.requires_grad)
    lines = [f"trained in group {group}: {count:,} parameters" for group, count in sorted(trained.items())]
    encoder: nn.Module | None = getattr(parts.stage, "encoder", None)
    if frozen:
        lines.append(f"frozen in the model: {frozen:,} parameters")
    if encoder is not None:
        lines.append(f"frozen encoder: {sum(parameter.numel() for parameter in encoder.parameters()):,} parameters")
    return [*lines, f"published size of the trained model: {logical_parameters(module):,} parameters (no padding)"]


def describe_data(config: Config, parts: Parts) -> list[str]:
    readers = open_sources(config.data)
    mixture_of(config.data, readers, config.run.seed)  # refuses lanes for which a source is too small
    total = sum(source.weight for source in config.data.sources)
    lines = [
        f"data {reader.source}: {len(reader):,} samples, {source.weight / total:.1%} of the mixture"
        for source, reader in zip(config.data.sources, readers, strict=True)
    ]
    samples = config.run.max_steps * config.data.global_batch_size
    if isinstance(parts.stage, GenerationStage) and not parts.stage.encodes:
        lines.append(describe_cache(config, readers, parts.stage.encoder))
    return [*lines, f"samples to be seen: {samples:,} ({samples / sum(map(len, readers)):.2f} x the data)"]


def describe_step(config: Config, parts: Parts, batch: Batch) -> list[str]:
    scale = config.data.global_batch_size / len(batch)
    flops = parts.stage.flops(batch) * scale
    tokens = float(batch.attention_mask.sum()) * scale
    lines = [f"text and image tokens per step: {tokens:,.0f} (from the first {len(batch)} samples)"] if tokens else []
    return [
        *lines,
        f"FLOPs per step: {flops:.3e}, per process {flops / config.parallel.world_size:.3e}",
        f"FLOPs of the run: {flops * config.run.max_steps:.3e}",
    ]
