"""The search over layouts: its ranking is that of looking at everything, and what it refuses cannot run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rae_scale.config import Config, load_config, parse_config
from rae_scale.config.rules import check
from rae_scale.config.schema import ParallelConfig
from rae_scale.plan.hardware import Cluster, find_cluster
from rae_scale.plan.plan import memory_of, spare_bytes
from rae_scale.plan.samples import usual_samples
from rae_scale.plan.search import (
    ENGINES,
    Found,
    Search,
    Space,
    at_least,
    divisors,
    laid_out,
    layouts_of,
    overrides,
    search,
    settings_of,
)
from rae_scale.plan.step_time import plan_step
from rae_scale.plan.traffic import micro_batch_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TREE: dict[str, Any] = {
    "model": {"name": "dit-0.5b"},
    "engine": {"name": "fsdp2"},
    "data": {"global_batch_size": 16},
}
FEW = Space(engines=("fsdp2",), checkpointing=("none", "full"), offload=(False,))
GIB = 1 << 30


def base(**sections: Any) -> Config:
    return parse_config({**TREE, **sections})


def cluster(gpus: int, gibibytes: float = 79.1) -> Cluster:
    found = find_cluster("h100-80g", gpus)
    return replace(found, gpu=replace(found.gpu, memory_bytes=int(gibibytes * GIB)))


def everything(config: Config, on: Cluster, space: Space) -> list[Found]:
    """The best setting of each layout that fits, by planning all of them."""
    samples, best = usual_samples(config), []
    for engine, parallel in layouts_of(on, space):
        settings, _ = settings_of(config, engine, parallel, space)
        planned = [Found(each, plan_step(each, on), memory_of(each, samples, "auto")) for each in settings]
        fitting = [found for found in planned if spare_bytes(found.memory, on) >= 0]
        if fitting:
            best.append(max(fitting, key=lambda found: found.step.images_per_s))
    return sorted(best, key=lambda found: -found.step.images_per_s)


@pytest.fixture(scope="module")
def tight() -> Cluster:
    """Two GPUs on which whole copies of the model do not fit, nor the largest micro-batch without checkpointing."""
    return cluster(2, 21.0)


@pytest.fixture(scope="module")
def ranked(tight: Cluster) -> Search:
    return search(base(), tight, space=FEW)


@pytest.mark.long
def test_it_finds_what_looking_at_everything_finds(ranked: Search, tight: Cluster) -> None:
    wanted = everything(base(), tight, FEW)
    assert [found.config for found in ranked.fits] == [found.config for found in wanted]
    assert [found.step for found in ranked.fits] == [found.step for found in wanted]
    rates = [found.step.images_per_s for found in ranked.fits]
    assert rates == sorted(rates, reverse=True) and len(rates) >= 2
    assert ranked.slower == 0


def test_what_does_not_fit_is_refused_by_how_much(ranked: Search, tight: Cluster) -> None:
    """By a bound, below what the setting really takes. The same layout fits where there is more memory."""
    (refusal,) = ranked.refused
    assert refusal.layouts == 1 and refusal.reason.startswith("memory: in every setting ")
    parallel = ParallelConfig(dp_replicate=2)
    assert refusal.example.parallel == parallel
    memory = memory_of(refusal.example, usual_samples(base()), "auto")
    said = float(refusal.reason.split()[4])
    assert 0 < said <= round(-spare_bytes(memory, tight) / GIB, 1)
    roomy = search(base(), cluster(2), space=FEW)
    assert not roomy.refused and parallel in [found.config.parallel for found in roomy.fits]


def test_bounds_are_below_what_settings_take(tight: Cluster) -> None:
    samples = usual_samples(base())
    space = replace(FEW, checkpointing=("none", "selective", "full"))
    settings, _ = settings_of(base(), "fsdp2", ParallelConfig(dp_shard=2), space)
    planned = [Found(each, plan_step(each, tight), memory_of(each, samples, "auto")) for each in settings]
    said = 0
    for one in planned:
        for other in planned:
            bound, needed = at_least(one.config, other), one.memory.peak + one.memory.margin
            assert bound <= needed * (1 + 1e-9) or (bound - needed) < GIB, (one.config, other.config)
            said += bound > 0.8 * needed
    assert said > len(planned)


def test_a_larger_micro_batch_is_not_slower() -> None:
    """Which the search takes for granted."""
    for engine, parallel in (
        ("fsdp2", ParallelConfig(dp_shard=4, sp=2)),
        ("zero3", ParallelConfig(dp_shard=4, tp=2)),
        ("zero2", ParallelConfig(dp_shard=8)),
        ("fsdp2", ParallelConfig(dp_replicate=2, dp_shard=2, sp=2)),
    ):
        config = base(data={"global_batch_size": 256})
        settings, _ = settings_of(config, engine, parallel, Space())
        for checkpointing in ("none", "selective", "full"):
            chain = [each for each in settings if each.engine.activation_checkpointing == checkpointing]
            chain = [each for each in chain if not each.engine.offload_optimizer]
            rates = [plan_step(each, cluster(8)).images_per_s for each in sorted(chain, key=micro_batch_of)]
            assert len(rates) > 3 and rates == sorted(rates), (engine, parallel, checkpointing)


def test_only_as_many_as_asked_for() -> None:
    found = search(base(), cluster(2), space=FEW, top=1)
    assert len(found.fits) == 1 and found.slower >= 1
    assert found.layouts == len(list(layouts_of(found.cluster, FEW)))


def test_every_split_of_the_gpus() -> None:
    found = list(layouts_of(cluster(8), Space()))
    assert len(found) == len(ENGINES) * 20 == len(set(found))  # 8 = 2^3 into four factors: 6 over 3
    assert {parallel.world_size for _, parallel in found} == {8}
    local = [parallel for _, parallel in layouts_of(cluster(32), Space(local_only=True))]
    assert local and all(parallel.tp * parallel.sp <= 8 for parallel in local)
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_refusals_say_why() -> None:
    """Heads, the rules between settings, and a batch that does not divide; the same reason once."""
    found = search(base(data={"global_batch_size": 24}), cluster(16), space=Space(engines=("eager", "zero3")), top=0)
    assert found.slower + sum(refusal.layouts for refusal in found.refused) == found.layouts == 70
    reasons = {refusal.reason.split(";")[0]: refusal for refusal in found.refused}
    assert any("does not divide the 2 key and value heads" in each or "key and value heads" in each for each in reasons)
    assert any(each.startswith("engine.name=eager runs one process") for each in reasons)
    assert any("does not divide by parallel.dp_replicate x dp_shard = 16" in each for each in reasons)
    assert len(reasons) == len(found.refused) < 12
    for refusal in found.refused:
        assert refusal.layouts > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_settings_are_valid_configurations(engine: str) -> None:
    parallel = ParallelConfig(dp_shard=1 if engine == "eager" else 4)
    config = base(engine={"name": "fsdp2", "activation_checkpointing": "selective", "saved_ops": {"attention": 2}})
    settings, problem = settings_of(config, engine, parallel, Space())
    assert settings and not problem
    offloads = {each.engine.offload_optimizer for each in settings}
    assert offloads == ({False, True} if engine in ("eager", "fsdp2", "zero3") else {False})
    for each in settings:
        assert not check(each) and Config.model_validate(each.model_dump()) == each
        kept = {"attention": 2} if each.engine.activation_checkpointing == "selective" else {}
        assert each.engine.saved_ops == kept
    assert {micro_batch_of(each) for each in settings} == set(divisors(16 // parallel.world_size))


def test_overrides_make_the_configuration() -> None:
    """To be pasted after the file's name."""
    path = CONFIGS / "run/pretrain-2.4b.yaml"
    start = load_config(path)
    parallel = ParallelConfig(dp_replicate=2, dp_shard=2, tp=2)
    for engine in ("fsdp2", "zero2"):
        placed = parallel if engine == "fsdp2" else ParallelConfig(dp_shard=4, sp=2)
        settings, _ = settings_of(start, engine, placed, Space())
        for setting in settings[::3]:
            assert load_config(path, overrides(start, setting)) == setting
    assert overrides(start, start) == []
    assert overrides(start, laid_out(start, "fsdp2", parallel)) == [
        "parallel.dp_replicate=2",
        "parallel.dp_shard=2",
        "parallel.tp=2",
    ]
