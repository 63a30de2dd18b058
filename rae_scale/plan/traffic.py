"""What the ranks of a configuration send each other in one optimizer step: exact payloads, and over which links.

Payloads are those of the closed formulas of `rae_scale/engines/communication.py` and `rae_scale/parallel/volume.py`:
what a `Ledger` records in a real run, to the byte. Left out is what the training loop adds, two all-reduces of a few
counts and sums. Bytes on the wire follow from them and from how a group's ranks lie on the nodes (`links.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

from rae_scale.config import Config
from rae_scale.config.schema import ModelConfig, ParallelConfig
from rae_scale.engines.communication import (
    ParameterSpec,
    Precision,
    Unit,
    fsdp2_volume,
    specs_of,
    units_of,
    zero3_volume,
    zero12_volume,
)
from rae_scale.engines.zero_gathers import DEEPSPEED_LIMITS
from rae_scale.parallel.ledger import Kind, Volume, sent
from rae_scale.parallel.volume import MicroStep, layers_calls, layers_volume
from rae_scale.plan.links import Span, crossing, span_of
from rae_scale.plan.models import generator, language_model, recorded_calls, tensor_placements, trained_module
from rae_scale.plan.samples import Samples, usual_samples
from rae_scale.train.parts import GENERATION_STAGES

Phase = Literal["forward", "backward", "layers", "step"]
"""When a transfer happens, and so what it can hide behind: an engine's gathers behind the computation of forward, its
gathers and reductions behind that of backward. What layers exchange, and what the step does between backward and the
next forward, has nothing to hide behind."""


class Transfer(NamedTuple):
    """All collectives of one kind and group in a phase of the step.

    payload: bytes, as `parallel.ledger` counts them. calls: how many collectives.
    span:    the group's ranks and how many of them share a node.
    """

    phase: Phase
    kind: Kind
    group: str
    payload: int
    calls: int
    span: Span

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, on average."""
        return sent(self.kind, self.payload, self.span.ranks)

    @property
    def crossing(self) -> float:
        """The part of `sent` that goes over the network."""
        return crossing(self.kind, self.payload, self.span)


@dataclass(frozen=True)
class Traffic:
    """One step's transfers. notes: where a number is a bound and not exact."""

    transfers: tuple[Transfer, ...]
    notes: tuple[str, ...] = ()

    def volume(self) -> Volume:
        """Payload bytes by (kind, group), as `Ledger.volume` gives them."""
        volume: Volume = Volume()
        for transfer in self.transfers:
            volume[transfer.kind, transfer.group] += transfer.payload
        return +volume

    @property
    def sent(self) -> float:
        return sum(transfer.sent for transfer in self.transfers)

    @property
    def crossing(self) -> float:
        return sum(transfer.crossing for transfer in self.transfers)


def micro_batch_of(config: Config) -> int:
    """Samples of a micro-batch of each data-parallel rank."""
    return config.data.micro_batch_size or local_batch(config)


def local_batch(config: Config) -> int:
    return config.data.global_batch_size // (config.parallel.dp_replicate * config.parallel.dp_shard)


def plan_traffic(
    config: Config,
    gpus_per_node: int,
    samples: Samples | None = None,
    *,
    micro_batch: int | None = None,
    tp_rank: int = 0,
) -> Traffic:
    """One step's traffic of a rank. All micro-batches are taken to be alike.

    micro_batch: samples of a micro-batch; by default the configuration's.
    tp_rank:     whose tensors are counted: a vocabulary may not divide by tp.

    Raises:
        ValueError: the model cannot be split over tp and sp, or a name means none.
    """
    samples = samples or usual_samples(config)
    micro_batch = micro_batch or micro_batch_of(config)
    micro_steps = -(-local_batch(config) // micro_batch)
    engine, parallel = config.engine, config.parallel
    found = engine_transfers(
        config.stage,
        config.model,
        engine.name if engine.name != "zero" else f"zero{engine.zero_stage}",
        engine.precision,
        engine.activation_checkpointing != "none",
        parallel,
        micro_steps,
        tp_rank,
        gpus_per_node,
    )
    if config.stage in GENERATION_STAGES:
        found += layer_transfers(config, samples, micro_batch, micro_steps, gpus_per_node)
    return Traffic(found, tuple(notes(config)))


def notes(config: Config) -> Iterator[str]:
    engine = config.engine
    if engine.zero_hpz > 1:
        yield (
            f"engine.zero_hpz={engine.zero_hpz}: gathers are counted as without it; those of backward then stay within "
            "the node, for which there is no formula yet"
        )
    if engine.activation_checkpointing == "selective" and engine.saved_ops.get("communication", 0) > 0:
        yield (
            f"engine.saved_ops.communication={engine.saved_ops['communication']}: counted as if a block computed again "
            "exchanged everything again, which is an upper bound"
        )


@cache
def engine_transfers(
    stage: Any,
    model: ModelConfig,
    engine: str,
    precision: Precision,
    checkpointed: bool,
    parallel: ParallelConfig,
    micro_steps: int,
    tp_rank: int,
    gpus_per_node: int,
) -> tuple[Transfer, ...]:
    """What the engine sends, by phase. engine: eager, fsdp2, zero1, zero2 or zero3."""
    if parallel.world_size == 1:
        return ()
    specs = local_specs(stage, model, parallel.tp, tp_rank)
    if engine == "fsdp2":
        parts = fsdp2_parts(fsdp2_units(stage, model, parallel.tp, tp_rank), parallel, precision, micro_steps)
    elif engine == "zero3":
        parts = zero3_parts(stage, model, specs, parallel, precision, micro_steps, checkpointed)
    else:
        parts = zero12_parts(specs, 1 if engine == "zero1" else 2, parallel, micro_steps)
    return tuple(
        Transfer(phase, kind, group, payload, max(1, calls), span_of(group, parallel, gpus_per_node))
        for phase, volume, calls in parts
        for (kind, group), payload in volume.items()
    )


Part = tuple[Phase, Volume, int]
"""Phase, payloads, and the number of collectives that make each of them up."""


@cache
def local_specs(stage: Any, model: ModelConfig, tp: int, tp_rank: int) -> tuple[ParameterSpec, ...]:
    module, group_of = trained_module(Config(stage=stage, model=model))
    placements = tensor_placements(stage, model, tp, tp_rank) if tp > 1 else None
    return tuple(specs_of(module, group_of, placements))


@cache
def fsdp2_units(stage: Any, model: ModelConfig, tp: int, tp_rank: int) -> tuple[Unit, ...]:
    module, _ = trained_module(Config(stage=stage, model=model))
    return tuple(units_of(module, local_specs(stage, model, tp, tp_rank)))


def fsdp2_parts(units: Sequence[Unit], parallel: ParallelConfig, precision: Precision, micro_steps: int) -> list[Part]:
    whole = fsdp2_volume(units, parallel, precision, micro_steps)
    # As if all units stayed gathered for backward: what forward gathers.
    once = fsdp2_volume([replace(unit, root=True) for unit in units], parallel, precision, micro_steps)
    again = sum(not unit.root and unit.backward for unit in units)
    trained = sum(any(spec.group is not None for spec in unit.parameters) for unit in units)
    forward = only(once, "all_gather")
    reduced = only(whole, "reduce_scatter") + only(whole, "all_reduce", "replicate")
    return [
        ("forward", forward, micro_steps * len(units)),
        ("backward", only(whole, "all_gather") - forward, micro_steps * again),
        ("backward", reduced, trained),
        ("step", whole - only(whole, "all_gather") - reduced, 1),
    ]


def zero3_parts(
    stage: Any,
    model: ModelConfig,
    specs: Sequence[ParameterSpec],
    parallel: ParallelConfig,
    precision: Precision,
    micro_steps: int,
    checkpointed: bool,
) -> list[Part]:
    """A gather is one call per module that fetches; a reduction takes all gradients of a bucket of 2e8 elements."""
    calls = recorded_calls(stage, model, checkpointed)
    whole = zero3_volume(specs, calls, parallel, precision, micro_steps)
    gathered = only(whole, "all_gather")
    # Forward gathers everything once in each micro-step; small parameters only in the first, for which this is too
    # much by less than a hundredth.
    element = 2 if precision == "bf16" else 4
    once = micro_steps * element * sum(spec.numel for spec in specs)
    forward = Volume({key: min(once, payload) for key, payload in gathered.items()})
    large = sum(spec.numel > DEEPSPEED_LIMITS.persistence for spec in specs)
    reduced = only(whole, "reduce_scatter")
    elements = sum(spec.numel for spec in specs if spec.group is not None)
    return [
        ("forward", forward, micro_steps * large),
        ("backward", gathered - forward, micro_steps * large),
        ("backward", reduced, micro_steps * -(-elements // 200_000_000)),
        ("step", whole - gathered - reduced, 1),
    ]


def zero12_parts(
    specs: Sequence[ParameterSpec], zero_stage: Literal[1, 2], parallel: ParallelConfig, micro_steps: int
) -> list[Part]:
    """DeepSpeed's stages 1 and 2 leave `overlap_comm` off unless asked: they reduce while nothing else happens."""
    whole = zero12_volume(specs, zero_stage, parallel, micro_steps)
    elements = sum(spec.numel for spec in specs if spec.group is not None)
    return [("step", whole, (micro_steps if zero_stage == 2 else 1) * -(-elements // 200_000_000))]


def only(volume: Volume, kind: Kind, group: str | None = None) -> Volume:
    return Volume({key: count for key, count in volume.items() if key[0] == kind and group in (None, key[1])})


def layer_transfers(
    config: Config, samples: Samples, micro_batch: int, micro_steps: int, gpus_per_node: int
) -> tuple[Transfer, ...]:
    """What tensor and sequence parallel layers exchange, and ranks that share the encoder's work."""
    parallel = config.parallel
    if parallel.tp * parallel.sp == 1:
        return ()
    dit, llm = generator(config), language_model(config)
    step = micro_step_of(config, samples, micro_batch)
    volume = layers_volume(dit, llm, step, parallel)
    calls = layers_calls(dit, llm, step, parallel)
    return tuple(
        Transfer(
            "layers",
            kind,
            group,
            micro_steps * payload,
            micro_steps * calls[kind, group],
            span_of(group, parallel, gpus_per_node),
        )
        for (kind, group), payload in volume.items()
    )


def micro_step_of(config: Config, samples: Samples, micro_batch: int) -> MicroStep:
    engine = config.engine
    bf16 = engine.precision == "bf16"
    gathers_bf16 = bf16 and (engine.name == "fsdp2" or engine.zero_stage == 3)
    again = engine.activation_checkpointing == "full" or (
        engine.activation_checkpointing == "selective" and engine.saved_ops.get("communication", 0) != -1
    )
    return MicroStep(
        batch=micro_batch,
        text_tokens=round(samples.tokens * micro_batch),
        labelled=-(-round(samples.labelled * micro_batch) // config.parallel.sp),
        product_bytes=2 if bf16 else 4,
        weight_bytes=2 if gathers_bf16 else 4,
        recomputed=again,
        encodes=config.data.latent_cache is None,
    )
