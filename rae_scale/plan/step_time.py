"""How long one optimizer step takes: a roofline per part of the model, and the communication that nothing hides.

    part          max(FLOPs / rate, weights / bandwidth) of its products + attention likewise + element-wise bytes /
                  bandwidth, forward, backward and what checkpointing computes again
    host          what issuing the kernels takes longer than running them: small models and micro-batches
    copies        what the engine copies: gathered buffers to weights, casts and sums of gradients
    optimizer     bytes of the update / bandwidth; with offloading, transfers and the host's memory
    tensor and sequence parallel   all of it: the next product waits for it
    data parallel what of gathers and reductions does not hide behind computation:
                  max((1 - overlap) x communication, communication - overlap x computation), forward and backward each
    data loading  what the hosts take longer to decode than all of the above, if their rate is given

Rates are peaks times `Rates`; parts add up to the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from rae_scale.config import Config
from rae_scale.parallel.ledger import sizes_of
from rae_scale.plan.encoders import EncoderShape, encoder_shape
from rae_scale.plan.hardware import DEFAULT_RATES, Cluster, Rates
from rae_scale.plan.launches import launch_seconds
from rae_scale.plan.links import collective_seconds
from rae_scale.plan.models import generator
from rae_scale.plan.passes import Kernels, Passes, plan_passes, update_bytes
from rae_scale.plan.samples import Samples, usual_samples
from rae_scale.plan.traffic import Traffic, local_batch, local_specs, micro_batch_of, plan_traffic
from rae_scale.plan.work import Flops, PartWork, plan_work
from rae_scale.train.parts import GENERATION_STAGES

HOST_BANDWIDTH = 30e9
"""Bytes/s of host memory per GPU for an update there: eight channels of DDR5-4800 on each of two sockets are 614 GB/s
for eight GPUs, of which a streaming update in PyTorch reaches less than half. Not measured."""

FORWARD_BYTES, BACKWARD_BYTES = 8 / 4, 16 / 10
"""Of attention, per FLOP and token that a query sees: queries, keys, values and outputs are 8 bytes per channel for 4
FLOPs; with their gradients 16 for 10 (`kernels/bench/roofline.py`)."""


class Phases(NamedTuple):
    """Seconds per micro-step."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class StepTime:
    """One optimizer step, as planned.

    parts:    seconds; they add up to `seconds`.
    computation: of these, per part of the model: products, attention, element-wise.
    hidden:   seconds of data-parallel communication that computation hides.
    images:   of the global batch.
    images_per_s, images_per_s_per_gpu: throughput.
    mfu, hfu: model and hardware FLOPs over what all GPUs could do at their bf16 peak.
    """

    parts: Mapping[str, float]
    computation: Mapping[str, Mapping[str, float]]
    hidden: float
    images: int
    gpus: int
    mfu: float
    hfu: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def exposed(self) -> float:
        """Seconds in which GPUs wait for each other."""
        return sum(self.parts[name] for name in ("tensor parallel", "sequence parallel", "data parallel"))

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def images_per_s_per_gpu(self) -> float:
        return self.images_per_s / self.gpus


def plan_step(
    config: Config,
    cluster: Cluster,
    rates: Rates = DEFAULT_RATES,
    *,
    samples: Samples | None = None,
    micro_batch: int | None = None,
    kernels: Kernels = "auto",
    loader_rate: float | None = None,
) -> StepTime:
    """The time of a step of `config` on `cluster`.

    micro_batch: samples of a micro-batch; by default the configuration's.
    loader_rate: images/s that one node's host decodes; None leaves data loading out.

    Raises:
        ValueError: the cluster has another number of GPUs than there are ranks, the model cannot be split so, or a
            name means none.
    """
    check_ranks(config, cluster)
    samples = samples or usual_samples(config)
    micro_batch = micro_batch or micro_batch_of(config)
    micro_steps = -(-local_batch(config) // micro_batch)
    shape = encoder_shape(config.model.encoder)
    work = plan_work(config, samples, micro_batch=micro_batch)
    traffic = plan_traffic(config, cluster.gpus_per_node, samples, micro_batch=micro_batch)
    machine = Machine(cluster, rates)

    passes = plan_passes(config, shape, samples, micro_batch, kernels)
    tokens = tokens_of_parts(config, shape, samples)
    computation: dict[str, dict[str, float]] = {}
    model_phases = []
    parts: dict[str, float] = {}
    for name, part in work.parts.items():
        share = share_of(name, config, micro_batch)
        speed = rates.fp8 if config.engine.fp8 and name == "DiT" else 1.0
        found = machine.part(part, share, tokens[name], passes.get(name, Passes()), speed)
        computation[name] = {kind: micro_steps * phases.total for kind, phases in found.items()}
        parts[name] = sum(computation[name].values())
        if name != "encoder" or config.stage == "encoder":
            model_phases.append(total(found))
    forward = sum(phases.forward for phases in model_phases)
    backward = sum(phases.backward for phases in model_phases)
    launched = launch_seconds(config, shape, rates)
    parts["host"] = micro_steps * max(0.0, launched - sum(parts.values()) / micro_steps)
    parts["copies"] = copied_bytes(config, traffic, micro_steps) / machine.bandwidth
    parts["optimizer"] = optimizer_seconds(config, machine, kernels)

    seconds = {"tensor parallel": 0.0, "sequence parallel": 0.0, "forward": 0.0, "backward": 0.0, "step": 0.0}
    for transfer in traffic.transfers:
        phase: str = transfer.phase
        if phase == "layers":
            phase = "sequence parallel" if transfer.group == "sp" else "tensor parallel"
        seconds[phase] += collective_seconds(
            transfer.kind, transfer.payload, transfer.calls, transfer.span, cluster, rates
        )
    exposed = [
        exposed_seconds(seconds["forward"], micro_steps * forward, rates.overlap),
        exposed_seconds(seconds["backward"], micro_steps * backward, rates.overlap),
    ]
    parts["tensor parallel"], parts["sequence parallel"] = seconds["tensor parallel"], seconds["sequence parallel"]
    parts["data parallel"] = sum(exposed) + seconds["step"]
    images, gpus = config.data.global_batch_size, config.parallel.world_size
    parts["data loading"] = 0.0
    if loader_rate is not None:
        nodes = -(-gpus // cluster.gpus_per_node)
        parts["data loading"] = max(0.0, images / (loader_rate * nodes) - sum(parts.values()))
    step = sum(parts.values())
    peak = gpus * cluster.gpu.flops * step
    return StepTime(
        parts=parts,
        computation=computation,
        hidden=seconds["forward"] + seconds["backward"] - sum(exposed),
        images=images,
        gpus=gpus,
        mfu=images * work.model / peak,
        hfu=images * work.hardware / peak,
    )


def check_ranks(config: Config, cluster: Cluster) -> None:
    ranks = config.parallel.world_size
    if ranks != cluster.gpus:
        sizes = " x ".join(f"{axis} {size}" for axis, size in sizes_of(config.parallel).items())
        raise ValueError(
            f"parallel ({sizes}) makes {ranks} ranks, but the cluster has {cluster.gpus} GPUs; choose sizes whose "
            f"product is {cluster.gpus}"
        )


class Machine:
    """One GPU at the rates that it reaches."""

    def __init__(self, cluster: Cluster, rates: Rates) -> None:
        self.cluster = cluster
        self.rates = rates
        self.bandwidth = cluster.gpu.bandwidth * rates.memory

    def part(self, work: PartWork, share: float, tokens: float, passes: Passes, speed: float) -> dict[str, Phases]:
        """Seconds per micro-step of a part's products, attention and element-wise operations.

        share:  how many samples' worth of the part this rank computes.
        tokens: of a sample.
        speed:  of 8-bit products, beside bf16 ones.
        """
        backward = work.backward + work.recomputed
        return {
            "products": Phases(
                self.products(work.forward, share, tokens) / speed, self.products(backward, share, tokens) / speed
            ),
            "attention": Phases(
                self.attention(work.forward, share, FORWARD_BYTES / tokens),
                self.attention(backward, share, BACKWARD_BYTES / tokens),
            ),
            "element-wise": Phases(passes.forward / self.bandwidth, (passes.backward + passes.again) / self.bandwidth),
        }

    def products(self, flops: Flops, share: float, tokens: float) -> float:
        """Each product reads its weights once, whatever the number of tokens: 2 bytes for 2 FLOPs of each token."""
        computed = share * flops.products / (self.cluster.gpu.flops * self.rates.matmul)
        return max(computed, min(1.0, share) * flops.products / tokens / self.bandwidth)

    def attention(self, flops: Flops, share: float, bytes_per_flop: float) -> float:
        computed = share * flops.attention / (self.cluster.gpu.flops * self.rates.attention)
        return max(computed, share * flops.attention * bytes_per_flop / self.bandwidth)


def total(phases: Mapping[str, Phases]) -> Phases:
    return Phases(sum(each.forward for each in phases.values()), sum(each.backward for each in phases.values()))


def share_of(part: str, config: Config, micro_batch: int) -> float:
    """How many samples' worth of a part one rank computes in a micro-step (`rae_scale/models/shard_tables.py`)."""
    tp, sp = config.parallel.tp, config.parallel.sp
    if part == "encoder":
        return -(-micro_batch // (tp * sp))
    if part == "projector":
        return micro_batch  # every rank, for all tokens
    if part == "connector":
        return micro_batch / sp
    return micro_batch / (tp * sp)


def tokens_of_parts(config: Config, shape: EncoderShape, samples: Samples) -> dict[str, float]:
    """Tokens of a sample in each part of `plan_work`."""
    tokens: dict[str, float] = {"encoder": shape.tokens or shape.num_tokens, "language model": samples.tokens}
    if config.stage in GENERATION_STAGES:
        tokens |= dict.fromkeys(("projector", "connector", "DiT"), generator(config).num_tokens)
    return tokens | {"decoder": shape.num_tokens + 1}


def copied_bytes(config: Config, traffic: Traffic, micro_steps: int) -> float:
    """Bytes that the engine moves through memory in a step.

    A gathered buffer is read and written once more; a gradient is cast to float32 (read as a, written as 4 bytes) and
    copied into the buffer that is reduced. Where weights are held whole in float32 (ZeRO 1 and 2, one process), each
    micro-step casts them instead, and adds its gradients to those before it.
    """
    a = 2 if config.engine.precision == "bf16" else 4
    specs = local_specs(config.stage, config.model, config.parallel.tp, 0)
    held, trained = sum(spec.numel for spec in specs), sum(spec.numel for spec in specs if spec.group is not None)
    gathered = sum(transfer.payload for transfer in traffic.transfers if transfer.phase in ("forward", "backward"))
    cast = (a + 4) * trained if a != 4 else 0
    added = 12 * trained * (micro_steps - 1)
    if config.engine.name == "eager" or (config.engine.name == "zero" and config.engine.zero_stage < 3):
        return micro_steps * (cast + ((a + 4) * held if a != 4 else 0)) + added
    reductions = micro_steps if config.engine.name == "zero" else 1
    return 2 * gathered + reductions * cast + (added if config.engine.name == "fsdp2" else 0)


def optimizer_seconds(config: Config, machine: Machine, kernels: Kernels) -> float:
    parallel, engine = config.parallel, config.engine
    specs = local_specs(config.stage, config.model, parallel.tp, 0)
    shards = parallel.dp_shard * parallel.sp * (parallel.dp_replicate if engine.name == "zero" else 1)
    updated = sum(spec.numel for spec in specs if spec.group is not None) / shards
    size = updated * update_bytes(config, kernels)
    if not engine.offload_optimizer:
        return size / machine.bandwidth
    # Gradients to the host, new weights back.
    moved = updated * (4 + 4) / (machine.cluster.gpu.host_link * machine.rates.link)
    return size / HOST_BANDWIDTH + moved


def exposed_seconds(communication: float, computation: float, overlap: float) -> float:
    """What computation does not hide."""
    return max((1 - overlap) * communication, communication - overlap * computation)
