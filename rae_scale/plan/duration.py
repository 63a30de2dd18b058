"""How long a whole run takes: steps, checkpoints, and what failures cost.

Letters: M mean time between failures of the whole cluster, C what a save costs the training, T time between saves.
Lost is C / T for saving, and at every failure half an interval, what was not yet on disk, and the restart:

    lost(T) = C / T + (T / 2 + write + restart) / M

Young (1974, "A first order approximation to the optimum checkpoint interval") minimises it with T = sqrt(2 C M); Daly
(2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", equation 37) has the next terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rae_scale.config import Config
from rae_scale.plan.hardware import DEFAULT_RATES, Cluster, Rates
from rae_scale.plan.traffic import local_specs

HOUR, DAY = 3600.0, 86400.0
FLOAT32 = 4
GB = 1e9

LLAMA_3_GPU_HOURS = 54 * 24 * 16_384 / 419
"""Between failures: 419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, section 3.3.4)."""


@dataclass(frozen=True)
class Reliability:
    """What interrupts a run and what it costs.

    gpu_hours: of work between failures: M is this over the number of GPUs.
    restart:   seconds from a failure until the program loads its checkpoint: found out, nodes replaced, started, built.
    storage:   bytes/s that all ranks together write to, and read from, the file system of the checkpoints. 10 GB/s is
               a small parallel one; a single NFS server has less than 1.
    """

    gpu_hours: float = LLAMA_3_GPU_HOURS
    restart: float = 300.0
    storage: float = 10e9

    def __post_init__(self) -> None:
        if self.gpu_hours <= 0 or self.storage <= 0 or self.restart < 0:
            raise ValueError(
                f"{self}: hours between failures and bytes/s of storage are positive, a restart takes 0 seconds or more"
            )


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of the tensors of one checkpoint, all ranks together: float32, one copy of everything (format 2)."""

    weights: int
    moments: int
    ema: int

    @property
    def total(self) -> int:
        return self.weights + self.moments + self.ema


@dataclass(frozen=True)
class Duration:
    """A run of `steps`. Times in seconds.

    training:  without saving and failures. gpu_hours: of the same, all GPUs together.
    checkpoint: size of one. per_rank: bytes of it that a rank copies and writes.
    stall:     that training waits for a save: the copy to host memory, and the writing of what the buffer does not
               take (`run.save_buffer_gb`).
    write:     until a checkpoint is on disk.
    mtbf:      M of the whole cluster.
    young, daly: best intervals between saves, but no shorter than `write`.
    interval:  that `run.save_every` gives; the whole run if it is 0.
    lost:      expected fraction of the time that saving and failures take, at `interval`, and `lost_best` at Daly's.
    expected:  seconds with them.
    failures:  expected during the run.
    """

    steps: int
    training: float
    gpu_hours: float
    checkpoint: CheckpointSize
    per_rank: float
    stall: float
    write: float
    mtbf: float
    young: float
    daly: float
    interval: float
    lost: float
    lost_best: float
    expected: float
    failures: float


def checkpoint_size(config: Config) -> CheckpointSize:
    """Frozen parameters are saved too; moments and moving average belong to those that train."""
    specs = local_specs(config.stage, config.model, 1, 0)
    trained = sum(spec.numel for spec in specs if spec.group is not None)
    ema = trained if config.optim.ema_decay is not None else 0
    return CheckpointSize(FLOAT32 * sum(spec.numel for spec in specs), 2 * FLOAT32 * trained, FLOAT32 * ema)


def young_interval(cost: float, mtbf: float) -> float:
    return math.sqrt(2 * cost * mtbf)


def daly_interval(cost: float, mtbf: float) -> float:
    """From the end of a save to the start of the next one."""
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return young_interval(cost, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def lost_fraction(interval: float, cost: float, write: float, restart: float, mtbf: float) -> float:
    """Expected; 1 if nothing is left."""
    return min(1.0, cost / interval + (interval / 2 + write + restart) / mtbf)


def plan_duration(
    config: Config,
    cluster: Cluster,
    step_seconds: float,
    reliability: Reliability | None = None,
    rates: Rates = DEFAULT_RATES,
) -> Duration:
    """The run of `config` if a step takes `step_seconds`."""
    reliability = reliability or Reliability()
    parallel, steps = config.parallel, config.run.max_steps
    size = checkpoint_size(config)
    # Replicas leave writing to the first of them.
    writers = parallel.dp_shard * parallel.sp * parallel.tp
    per_rank = size.total / writers
    write = size.total / reliability.storage
    buffered = min(per_rank, config.run.save_buffer_gb * GB)
    stall = buffered / (cluster.gpu.host_link * rates.link) + write * (1 - buffered / per_rank)
    mtbf = reliability.gpu_hours * HOUR / parallel.world_size
    # The checkpoint is read again.
    restart = reliability.restart + write
    daly = max(daly_interval(stall, mtbf), write)
    training = steps * step_seconds
    interval = (config.run.save_every or steps) * step_seconds
    lost = lost_fraction(interval, stall, write, restart, mtbf)
    return Duration(
        steps=steps,
        training=training,
        gpu_hours=training * parallel.world_size / HOUR,
        checkpoint=size,
        per_rank=per_rank,
        stall=stall,
        write=write,
        mtbf=mtbf,
        young=max(young_interval(stall, mtbf), write),
        daly=daly,
        interval=interval,
        lost=lost,
        lost_best=lost_fraction(daly, stall, write, restart, mtbf),
        expected=training / (1 - lost) if lost < 1 else math.inf,
        failures=training / mtbf,
    )
