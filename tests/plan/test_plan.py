"""A plan: its parts agree with each other and with what the planners of the parts say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rae_scale.config import Config, load_config
from rae_scale.plan.hardware import find_cluster
from rae_scale.plan.memory import plan_memory
from rae_scale.plan.plan import Plan, interval_steps, latent_bytes, make_plan
from rae_scale.plan.report import report
from rae_scale.plan.samples import Samples
from rae_scale.plan.step_time import plan_step
from rae_scale.plan.traffic import plan_traffic
from rae_scale.plan.work import plan_work

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def published(*overrides: str, run: str = "pretrain-2.4b") -> Config:
    return load_config(CONFIGS / f"run/{run}.yaml", overrides)


def planned(config: Config, gpu: str = "h100-80g", **arguments: Any) -> Plan:
    return make_plan(config, find_cluster(gpu, config.parallel.world_size), **arguments)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(published())


def test_it_fits_or_not_by_how_much(plan: Plan) -> None:
    needed = plan.memory.peak + plan.memory.margin
    assert plan.fits and plan.spare == plan.cluster.gpu.memory_bytes - needed
    small = replace(plan, cluster=replace(plan.cluster, gpu=replace(plan.cluster.gpu, memory_bytes=needed - 1)))
    assert not small.fits and small.spare == -1
    exact = replace(plan, cluster=replace(plan.cluster, gpu=replace(plan.cluster.gpu, memory_bytes=needed)))
    assert exact.fits


def test_json_holds_what_the_parts_say(plan: Plan) -> None:
    found = json.loads(json.dumps(plan.to_json()))
    memory, step = found["memory"], found["step"]
    assert sum(memory["phases"][memory["peak_phase"]].values()) == memory["peak"] == plan.memory.peak
    assert memory["spare"] == memory["gpu"] - memory["peak"] - memory["margin"]
    assert sum(step["parts"].values()) == pytest.approx(step["seconds"])
    assert step["images_per_s"] == pytest.approx(2048 / step["seconds"])
    assert sum(part["model"] for part in found["flops_per_image"].values()) == pytest.approx(plan.work.model)
    assert sum(each["payload"] for each in found["traffic"]) == sum(plan.traffic.volume().values())
    assert found["duration"]["checkpoint_bytes"] == plan.duration.checkpoint.total
    assert Config.model_validate(found["config"]) == plan.config


def test_the_interval_is_in_whole_steps(plan: Plan) -> None:
    steps = interval_steps(plan.duration, plan.step)
    assert steps == pytest.approx(plan.duration.daly / plan.step.seconds, abs=0.5)
    assert interval_steps(replace(plan.duration, daly=1e-6), plan.step) == 1


def test_longer_texts_cost_memory_and_time(plan: Plan) -> None:
    long = planned(plan.config, samples=Samples(512))
    assert long.memory.peak > plan.memory.peak and long.step.seconds > plan.step.seconds
    assert long.samples.tokens == 512 and long.work.model > plan.work.model


def test_gpus_and_ranks_must_agree(plan: Plan) -> None:
    with pytest.raises(ValueError, match=r"dp_shard 8 .*makes 8 ranks, but the cluster has 16 GPUs; choose"):
        make_plan(plan.config, find_cluster("h100-80g", 16))


SLOW = ("transformers", "deepspeed", "matplotlib", "torch._dynamo", "torch._inductor")


def test_nothing_is_imported_that_takes_as_long_as_a_plan() -> None:
    program = (
        f"SLOW = {SLOW}\n"
        "import sys; from rae_scale.cli.main import main; sys.argv = ['rae-scale', 'plan', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as stopped: assert not stopped.code, stopped.code\n"
        "print([name for name in SLOW if name in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, str(CONFIGS / "run/pretrain-0.5b.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "images/s" in done.stdout and done.stderr.splitlines()[-1] == "[]"


def test_with_cached_latents_the_encoder_is_absent(plan: Plan) -> None:
    """From memory, FLOPs, time and what ranks with the same samples send each other; its latents take disk instead."""
    layout = ("engine.name=fsdp2", "parallel.dp_shard=4", "parallel.tp=2", "data.micro_batch_size=16")
    online = published(*layout)
    cached, small = (
        published(*layout, "data.latent_cache.dir=/latents", f"data.latent_cache.dtype={dtype}")
        for dtype in ("bf16", "int8")
    )
    assert plan_work(online).parts.keys() - plan_work(cached).parts.keys() == {"encoder"}
    assert plan_memory(online, micro_batch=16).peak - plan_memory(cached, micro_batch=16).peak > 1.6e9
    steps = [plan_step(config, find_cluster("h100-80g", 8)) for config in (online, cached)]
    assert steps[0].seconds - steps[1].seconds >= steps[0].parts["encoder"] > 0
    sent = [sum(each.payload for each in plan_traffic(config, 8).transfers) for config in (online, cached)]
    assert sent[0] - sent[1] == 2048 // 4 * 256 * 1152 * 4
    assert [latent_bytes(config) for config in (online, cached, small)] == [None, 256 * 1152 * 2, 256 * (1152 + 4)]
    text = report(replace(plan, config=cached))
    assert "latent cache in bf16: 589,824 bytes of disk per image of the sources, 589.8 GB per million" in text
    assert "latent cache" not in report(plan)
    assert replace(plan, config=small).to_json()["latent_bytes_per_image"] == 256 * (1152 + 4)
