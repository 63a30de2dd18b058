"""What the run will need, by the planner: the measure for what machines have."""

from __future__ import annotations

from dataclasses import dataclass

from rae_scale.config import Config
from rae_scale.plan.duration import checkpoint_size
from rae_scale.plan.plan import memory_of
from rae_scale.plan.samples import usual_samples
from rae_scale.train.parts import GENERATION_STAGES


@dataclass(frozen=True)
class Needs:
    """Bytes. gpu: of the fullest rank, with the planner's margin. host: of each rank, beside the program's own.
    checkpoint: one of the whole run. handed_over: a file of weights on each machine while the run starts, for all ranks
    but the first. checkpoints: how many are on disk at the worst moment; forever: how many of `run.keep_every` more."""

    gpu: int
    host: int
    checkpoint: int
    handed_over: int
    checkpoints: int
    forever: int
    world_size: int


def needs_of(config: Config) -> Needs:
    """
    Raises:
        ValueError: the planner cannot lay the run out, so training could not either.
    """
    memory = memory_of(config, usual_samples(config), "auto")
    size, run = checkpoint_size(config), config.run
    return Needs(
        gpu=memory.peak + memory.margin,
        host=sum(memory.host.values()),
        checkpoint=size.total,
        handed_over=size.weights if config.stage in GENERATION_STAGES else 0,
        # The oldest one goes when the new one is complete.
        checkpoints=run.keep_last + 1,
        forever=run.max_steps // run.keep_every if run.keep_every else 0,
        world_size=config.parallel.world_size,
    )
