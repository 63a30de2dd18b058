"""One configuration on one cluster: what it takes of memory, network and time, put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rae_scale.config import Config
from rae_scale.data.latents import sample_bytes
from rae_scale.plan.duration import Duration, Reliability, plan_duration
from rae_scale.plan.encoders import encoder_shape
from rae_scale.plan.hardware import DEFAULT_RATES, Cluster, Rates
from rae_scale.plan.links import link_name
from rae_scale.plan.memory import MemoryPlan, plan_memory
from rae_scale.plan.passes import Kernels
from rae_scale.plan.samples import Samples, usual_samples
from rae_scale.plan.step_time import StepTime, check_ranks, plan_step
from rae_scale.plan.traffic import Traffic, micro_batch_of, plan_traffic
from rae_scale.plan.work import Work, plan_work


@dataclass(frozen=True)
class Plan:
    """What `config` needs of `cluster`, and what it reaches there.

    samples: of what length the text is taken to be. memory: of the fullest rank. work: FLOPs of one image.
    traffic: of one rank in one optimizer step. step: its time. duration: of the whole run.
    """

    config: Config
    cluster: Cluster
    rates: Rates
    samples: Samples
    memory: MemoryPlan
    work: Work
    traffic: Traffic
    step: StepTime
    duration: Duration

    @property
    def micro_batch(self) -> int:
        return micro_batch_of(self.config)

    @property
    def spare(self) -> int:
        """Bytes of the GPU that stay free; negative if the run does not fit."""
        return spare_bytes(self.memory, self.cluster)

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def latent_bytes(self) -> int | None:
        """Of one image in the latent cache; None without one."""
        return latent_bytes(self.config)

    def to_json(self) -> dict[str, Any]:
        """Bytes, seconds and FLOPs, without rounding."""
        memory, step, duration = self.memory, self.step, self.duration
        return {
            "config": self.config.model_dump(mode="json"),
            "cluster": asdict(self.cluster),
            "rates": asdict(self.rates),
            "samples": asdict(self.samples),
            "memory": {
                "phases": memory.phases,
                "peak": memory.peak,
                "peak_phase": memory.peak_phase,
                "margin": memory.margin,
                "gpu": self.cluster.gpu.memory_bytes,
                "spare": self.spare,
                "fits": self.fits,
                "host": memory.host,
            },
            "flops_per_image": {
                name: {"model": part.model, "hardware": part.hardware} for name, part in self.work.parts.items()
            },
            "traffic": transfers_of(self.traffic, self.cluster),
            "step": {
                "seconds": step.seconds,
                "parts": dict(step.parts),
                "computation": {part: dict(kinds) for part, kinds in step.computation.items()},
                "hidden": step.hidden,
                "images": step.images,
                "images_per_s": step.images_per_s,
                "images_per_s_per_gpu": step.images_per_s_per_gpu,
                "mfu": step.mfu,
                "hfu": step.hfu,
            },
            "duration": {
                **asdict(duration),
                "checkpoint_bytes": duration.checkpoint.total,
                "daly_steps": interval_steps(self.duration, self.step),
            },
            "latent_bytes_per_image": self.latent_bytes,
            "notes": list(self.traffic.notes),
        }


def make_plan(
    config: Config,
    cluster: Cluster,
    rates: Rates = DEFAULT_RATES,
    *,
    samples: Samples | None = None,
    kernels: Kernels = "auto",
    loader_rate: float | None = None,
    reliability: Reliability | None = None,
) -> Plan:
    """Plan a run, in a second or two.

    samples: None takes `usual_samples`. loader_rate: images/s that a node's host decodes; None leaves loading out.

    Raises:
        ValueError: the cluster has another number of GPUs than there are ranks, the model cannot be split so, or a
            name means none.
    """
    check_ranks(config, cluster)
    samples = samples or usual_samples(config)
    step = plan_step(config, cluster, rates, samples=samples, kernels=kernels, loader_rate=loader_rate)
    return Plan(
        config=config,
        cluster=cluster,
        rates=rates,
        samples=samples,
        memory=memory_of(config, samples, kernels),
        work=plan_work(config, samples, micro_batch=micro_batch_of(config)),
        traffic=plan_traffic(config, cluster.gpus_per_node, samples),
        step=step,
        duration=plan_duration(config, cluster, step.seconds, reliability, rates),
    )


def memory_of(config: Config, samples: Samples, kernels: Kernels) -> MemoryPlan:
    return plan_memory(
        config,
        micro_batch=micro_batch_of(config),
        text_tokens=samples.tokens,
        labelled_tokens=samples.labelled,
        kernels=kernels,
    )


def latent_bytes(config: Config) -> int | None:
    cache = config.data.latent_cache
    if cache is None:
        return None
    shape = encoder_shape(config.model.encoder)
    return sample_bytes(shape.num_tokens, shape.channels, cache.dtype)


def spare_bytes(memory: MemoryPlan, cluster: Cluster) -> int:
    return cluster.gpu.memory_bytes - memory.peak - memory.margin


def interval_steps(duration: Duration, step: StepTime) -> int:
    """Daly's interval between checkpoints in whole steps, for `run.save_every`."""
    return max(1, round(duration.daly / step.seconds))


def transfers_of(traffic: Traffic, cluster: Cluster) -> list[Mapping[str, Any]]:
    """Of a rank and step, one entry per kind, group and phase."""
    return [
        {
            "kind": transfer.kind,
            "group": transfer.group,
            "phase": transfer.phase,
            "ranks": transfer.span.ranks,
            "calls": transfer.calls,
            "payload": transfer.payload,
            "sent": transfer.sent,
            "over_network": transfer.crossing,
            "link": link_name(transfer.span, cluster),
        }
        for transfer in traffic.transfers
    ]
