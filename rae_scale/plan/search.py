"""The fastest layouts that fit: every engine and every split of the GPUs, each with its best setting.

A layout is an engine and the sizes of the mesh; its settings are the micro-batch, activation checkpointing and where
the optimizer state is kept. Times are quick to plan and memory is not, so settings are looked at from the fastest down
and only until as many layouts fit as were asked for: what is left is slower than all of them. Of settings that differ
in the micro-batch alone, the larger one is taken to be the faster one.
"""

from __future__ import annotations

import heapq
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rae_scale.config import Config
from rae_scale.config.rules import check
from rae_scale.config.schema import EngineConfig, ParallelConfig
from rae_scale.models.parallel_limits import parallel_problems
from rae_scale.plan.hardware import DEFAULT_RATES, Cluster, Rates
from rae_scale.plan.memory import MemoryPlan
from rae_scale.plan.models import generator, language_model
from rae_scale.plan.passes import Kernels
from rae_scale.plan.plan import memory_of, spare_bytes
from rae_scale.plan.samples import Samples, usual_samples
from rae_scale.plan.step_time import StepTime, plan_step
from rae_scale.plan.traffic import local_batch, micro_batch_of
from rae_scale.train.parts import GENERATION_STAGES

Checkpointing = Literal["none", "selective", "full"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")
"""From what takes most memory to what takes least."""
ENGINES = ("eager", "zero1", "zero2", "zero3", "fsdp2")
GIB = 1 << 30


@dataclass(frozen=True)
class Space:
    """What is searched. local_only: tensor and sequence parallel groups within one node only."""

    engines: Sequence[str] = ENGINES
    checkpointing: Sequence[Checkpointing] = CHECKPOINTING
    offload: Sequence[bool] = (False, True)
    local_only: bool = False


@dataclass(frozen=True)
class Found:
    """A layout that fits, with the fastest of its settings that do."""

    config: Config
    step: StepTime
    memory: MemoryPlan


@dataclass(frozen=True)
class Refusal:
    """Layouts that cannot run, and why. example: one of them; if it is for memory, the one that came closest."""

    layouts: int
    reason: str
    example: Config


@dataclass(frozen=True)
class Search:
    """fits: the fastest first. slower: valid layouts that would come after them; their memory was not planned."""

    base: Config
    cluster: Cluster
    fits: tuple[Found, ...]
    refused: tuple[Refusal, ...]
    slower: int

    @property
    def layouts(self) -> int:
        return len(self.fits) + sum(refusal.layouts for refusal in self.refused) + self.slower


class Candidate:
    """A layout that is valid: its settings in chains, in each the same but for micro-batches that become smaller.

    least: of what does not fit, the setting that takes least, and how many bytes at least.
    """

    def __init__(self, settings: Sequence[Config], limit: int) -> None:
        chains: dict[tuple[str, bool], list[Config]] = {}
        for setting in settings:
            kept = setting.engine.activation_checkpointing, setting.engine.offload_optimizer
            chains.setdefault(kept, []).append(setting)
        self.chains = [sorted(chain, key=micro_batch_of) for chain in chains.values()]
        self.limit = limit
        self.misses: list[Found] = []
        self.least: tuple[float, Config] | None = None

    def next_of(self, chain: list[Config]) -> Config | None:
        """Take the largest micro-batch that may fit, by what is known of others."""
        while chain:
            setting = chain.pop()
            if self.may_fit(setting):
                return setting
        return None

    def miss(self, planned: Found) -> None:
        """Learn from a setting that did not fit."""
        self.misses.append(planned)
        assert not self.may_fit(planned.config)

    def may_fit(self, setting: Config) -> bool:
        needed = max((at_least(setting, miss) for miss in self.misses), default=0.0)
        if needed > self.limit and (self.least is None or needed < self.least[0]):
            self.least = needed, setting
        return needed <= self.limit


def search(
    config: Config,
    cluster: Cluster,
    rates: Rates = DEFAULT_RATES,
    *,
    top: int = 10,
    space: Space | None = None,
    samples: Samples | None = None,
    kernels: Kernels = "auto",
    loader_rate: float | None = None,
) -> Search:
    """The `top` fastest layouts of `config` for `cluster`, whatever layout it has itself. Its global batch stays.

    Raises:
        ValueError: a name of a model means none.
    """
    samples, space, limit = samples or usual_samples(config), space or Space(), cluster.gpu.memory_bytes
    invalid: dict[str, list[tuple[str, Config]]] = {}
    candidates: list[Candidate] = []
    for engine, parallel in layouts_of(cluster, space):
        valid, problem = settings_of(config, engine, parallel, space)
        if valid:
            candidates.append(Candidate(valid, limit))
        else:
            invalid.setdefault(generic(problem), []).append((problem, laid_out(config, engine, parallel)))

    queue: list[tuple[float, int, StepTime, Config, Candidate, list[Config]]] = []
    order = itertools.count()

    def enqueue(candidate: Candidate, chain: list[Config]) -> None:
        setting = candidate.next_of(chain)
        if setting is not None:
            step = plan_step(setting, cluster, rates, samples=samples, kernels=kernels, loader_rate=loader_rate)
            heapq.heappush(queue, (-step.images_per_s, next(order), step, setting, candidate, chain))

    for candidate in candidates:
        for chain in candidate.chains:
            enqueue(candidate, chain)
    fits: list[Found] = []
    settled: set[Candidate] = set()
    while queue and len(fits) < top:
        *_, step, setting, candidate, chain = heapq.heappop(queue)
        if candidate in settled:
            continue
        if candidate.may_fit(setting):
            planned = Found(setting, step, memory_of(setting, samples, kernels))
            if spare_bytes(planned.memory, cluster) >= 0:
                fits.append(planned)
                settled.add(candidate)
                continue
            candidate.miss(planned)
        enqueue(candidate, chain)
    waiting = {entry[4] for entry in queue} - settled
    too_large = [each.least for each in candidates if each.least and each not in settled | waiting]
    return Search(config, cluster, tuple(fits), tuple(refusals(invalid, too_large, limit)), len(waiting))


def layouts_of(cluster: Cluster, space: Space) -> Iterator[tuple[str, ParallelConfig]]:
    """Every engine with every split of the GPUs into the four axes of the mesh."""
    gpus = cluster.gpus
    for tp in divisors(gpus):
        for sp in divisors(gpus // tp):
            if space.local_only and tp * sp > cluster.gpus_per_node:
                continue
            for shard in divisors(gpus // tp // sp):
                replicate = gpus // tp // sp // shard
                parallel = ParallelConfig(dp_replicate=replicate, dp_shard=shard, sp=sp, tp=tp)
                yield from ((engine, parallel) for engine in space.engines)


def divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def settings_of(base: Config, engine: str, parallel: ParallelConfig, space: Space) -> tuple[list[Config], str]:
    """The valid settings of a layout; if there are none, also the first reason why."""
    problems = split_problems(base, parallel)
    if problems:
        return [], problems[0]
    valid = []
    layout = laid_out(base, engine, parallel)
    for checkpointing in space.checkpointing:
        for offload in space.offload:
            section = engine_section(base, engine, checkpointing, offload)
            for micro_batch in divisors(max(1, local_batch(layout))):
                data = base.data.model_copy(update={"micro_batch_size": micro_batch})
                setting = layout.model_copy(update={"engine": section, "data": data})
                found = check(setting)
                if not found:
                    valid.append(setting)
                problems += found
    return valid, "" if valid else problems[0]


def split_problems(base: Config, parallel: ParallelConfig) -> list[str]:
    if base.stage not in GENERATION_STAGES:
        return []
    return parallel_problems(generator(base), language_model(base), tp=parallel.tp, sp=parallel.sp)


def laid_out(base: Config, engine: str, parallel: ParallelConfig) -> Config:
    section = engine_section(base, engine, base.engine.activation_checkpointing, base.engine.offload_optimizer)
    return base.model_copy(update={"parallel": parallel, "engine": section})


def engine_section(base: Config, engine: str, checkpointing: str, offload: bool) -> EngineConfig:
    """The base's, with this engine. What it keeps of a block under selective checkpointing stays; its second copy of
    parameters within a node (`zero_hpz`) does not, as there is no formula for its traffic."""
    given: dict[str, Any] = base.engine.model_dump() | {
        "name": engine.rstrip("123") if engine.startswith("zero") else engine,
        "activation_checkpointing": checkpointing,
        "offload_optimizer": offload,
        "zero_hpz": 1,
    }
    if engine.startswith("zero"):
        given["zero_stage"] = int(engine[-1])
    if checkpointing != "selective":
        given["saved_ops"] = {}
    elif not given["saved_ops"]:
        del given["saved_ops"]
    return EngineConfig.model_validate(given)


def at_least(config: Config, planned: Found) -> float:
    """A bound below the memory of a setting, by what another one of the same layout takes.

    Whatever is kept of a block, and however many samples, the optimizer's phase takes the same. With as much kept and
    no fewer samples, the peak is no lower. With fewer of them, activations shrink at most in proportion. One micro-step
    and several are not compared: several may keep whole gradients between them.
    """
    other, memory = planned.config, planned.memory
    if config.engine.offload_optimizer != other.engine.offload_optimizer or several(config) != several(other):
        return 0.0
    bound: float = sum(memory.phases["optimizer"].values())
    kept, other_kept = (CHECKPOINTING.index(each.engine.activation_checkpointing) for each in (config, other))
    ratio = min(1.0, micro_batch_of(config) / micro_batch_of(other))
    if kept == other_kept or (ratio == 1.0 and kept <= other_kept):
        parts = memory.phases[memory.peak_phase]
        shrinking = sum(parts.get(name, 0) for name in ("activations", "workspace"))
        bound = max(bound, memory.peak - shrinking * (1 - ratio))
    return bound * (1 + memory.margin / memory.peak)


def several(config: Config) -> bool:
    return micro_batch_of(config) < local_batch(config)


def refusals(
    invalid: dict[str, list[tuple[str, Config]]], too_large: Sequence[tuple[float, Config]], limit: int
) -> Iterator[Refusal]:
    """By reason, the most frequent first."""
    found = [Refusal(len(group), *group[0]) for group in invalid.values()]
    if too_large:
        low, example = min(too_large, key=lambda least: least[0])
        high = max(needed for needed, _ in too_large)
        found.append(
            Refusal(
                len(too_large),
                f"memory: in every setting {(low - limit) / GIB:,.1f} to {(high - limit) / GIB:,.1f} GiB more than the "
                f"GPU's {limit / GIB:,.1f}, or still more",
                example,
            )
        )
    yield from sorted(found, key=lambda refusal: -refusal.layouts)


def generic(problem: str) -> str:
    """A problem without its numbers, by which problems are grouped."""
    return re.sub(r"\d+", "N", problem)


def overrides(base: Config, config: Config) -> list[str]:
    """What to write after the configuration file `base` on the command line to get `config`."""
    found = []
    for section in ("parallel", "engine", "data"):
        before, after = (each.model_dump(mode="json")[section] for each in (base, config))
        found += [f"{section}.{name}={value_words(after[name])}" for name in after if after[name] != before[name]]
    return found


def value_words(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) if isinstance(value, dict) else str(value).lower()
