"""Step times: what they are made of, and what moves them."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from known import nothing_new

from rae_scale.config import Config
from rae_scale.plan.hardware import DEFAULT_RATES, Rates, find_cluster
from rae_scale.plan.passes import update_bytes
from rae_scale.plan.samples import Samples, usual_samples
from rae_scale.plan.step_time import StepTime, exposed_seconds, plan_step, share_of
from rae_scale.plan.work import plan_work

PERFECT = Rates(matmul=1.0, attention=1.0, memory=1.0, link=1.0, network=1.0, overlap=1.0, launch=0.0)


def config(*, micro_batch: int = 16, batch: int = 1024, model: str = "dit-2.4b", **sections: Any) -> Config:
    sections.setdefault("engine", {"name": "fsdp2", "activation_checkpointing": "full"})
    return Config.model_validate(
        {
            "model": {"name": model},
            "data": {"global_batch_size": batch, "micro_batch_size": micro_batch},
            "optim": {"ema_decay": 0.9999},
            **sections,
        }
    )


def step(settings: Config, gpu: str = "h100-80g", network: str | None = None, **arguments: Any) -> StepTime:
    return plan_step(settings, find_cluster(gpu, settings.parallel.world_size, network), **arguments)


def alone(**engine: Any) -> Config:
    """One GPU, one micro-step."""
    return config(micro_batch=64, batch=64, engine={"name": "eager", **engine})


def test_parts_add_up_and_throughput_follows() -> None:
    found = step(config(parallel={"dp_shard": 16, "sp": 2, "tp": 2}))
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    for name, kinds in found.computation.items():
        assert found.parts[name] == pytest.approx(sum(kinds.values()))
    assert found.images_per_s == pytest.approx(1024 / found.seconds)
    assert found.images_per_s_per_gpu == pytest.approx(found.images_per_s / 64)
    assert found.parts["tensor parallel"] > 0 and found.parts["sequence parallel"] > 0
    exposed = found.parts["tensor parallel"] + found.parts["sequence parallel"] + found.parts["data parallel"]
    assert found.exposed == pytest.approx(exposed)


def test_utilisation_is_flops_over_peak() -> None:
    settings = config(parallel={"dp_shard": 8})
    found, work = step(settings), plan_work(settings, micro_batch=16)
    peak = 8 * 989.4e12 * found.seconds
    assert found.mfu == pytest.approx(1024 * work.model / peak)
    assert found.hfu == pytest.approx(1024 * work.hardware / peak)
    assert 0 < found.mfu < found.hfu < 1


def test_the_dit_is_the_roofline_s() -> None:
    """Beside `kernels/bench/roofline.py`: products but for the first ones' input gradients, and element-wise bytes."""
    roofline = load_roofline()
    settings = alone()
    for kernels, way in (("auto", "fused"), ("reference", "eager")):
        found = step(settings, rates=PERFECT, kernels=kernels).computation["DiT"]
        rows = roofline.step_rows(roofline.Shape(batch=64), way, recompute_swiglu=True)
        gpu = roofline.GPUS["H100"]
        seconds: dict[str, float] = {}
        for row in rows:
            seconds[row.kind] = seconds.get(row.kind, 0.0) + roofline.seconds(row, gpu)
        assert found["products"] == pytest.approx(seconds["products"], rel=2e-3)
        assert found["attention"] == pytest.approx(seconds["attention"], rel=1e-6)
        assert found["element-wise"] == pytest.approx(seconds["memory"], rel=6e-3)


def load_roofline() -> Any:
    path = Path(__file__).resolve().parents[2] / "kernels/bench/roofline.py"
    spec = importlib.util.spec_from_file_location("roofline", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["roofline"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bytes_of_an_update() -> None:
    """As the roofline counts them: one pass of 42 bytes per parameter with its norm, less without an average or with
    moments in bfloat16; DeepSpeed's in separate passes."""
    plain = alone()
    assert update_bytes(plain, "auto") == 4 + 38 - 2  # the cast belongs to the gather here
    changed = plain.model_dump()
    changed["optim"] |= {"ema_decay": None, "moments": "bf16"}
    assert update_bytes(Config.model_validate(changed), "auto") == 40 - 8 - 8
    assert update_bytes(config(engine={"name": "zero"}), "auto") == 4 + 8 + 28 + 12 + 6


def test_rates_divide() -> None:
    """Twice the rate of products halves their time and nothing else's."""
    slow = step(alone(), rates=replace(PERFECT, matmul=0.5)).computation["language model"]
    fast = step(alone(), rates=PERFECT).computation["language model"]
    assert slow["products"] == pytest.approx(2 * fast["products"])
    assert slow["element-wise"] == fast["element-wise"] and slow["attention"] == fast["attention"]
    quick = step(alone(fp8=True), rates=PERFECT).computation
    assert quick["DiT"]["products"] == pytest.approx(step(alone()).computation["DiT"]["products"] * 0.68 / 1.4)
    assert quick["language model"]["products"] == fast["products"]


def test_checkpointing_costs_a_forward() -> None:
    """Of the blocks, but for the language model's last product."""
    plain, full = step(alone()), step(alone(activation_checkpointing="full"))
    ratio = full.computation["DiT"]["products"] / plain.computation["DiT"]["products"]
    assert ratio == pytest.approx(4 / 3, rel=0.01)
    assert full.mfu < plain.mfu and full.images == plain.images


def test_a_tiny_micro_batch_reads_weights_and_waits_for_the_host() -> None:
    one = step(config(micro_batch=1, batch=64, parallel={"dp_shard": 64}))
    many = step(config(micro_batch=16, parallel={"dp_shard": 64}))
    assert one.parts["host"] > 0 == many.parts["host"]
    short = step(alone(), samples=Samples(8, 1), micro_batch=1, rates=PERFECT).computation["language model"]
    assert short["products"] > 64 * plan_work(alone(), Samples(8, 1)).parts["language model"].hardware / 989.4e12


def test_what_overlaps() -> None:
    """Nothing, all, and what computation leaves over."""
    assert exposed_seconds(10.0, 100.0, 0.9) == pytest.approx(1.0)
    assert exposed_seconds(10.0, 100.0, 1.0) == 0.0
    assert exposed_seconds(100.0, 10.0, 0.9) == pytest.approx(91.0)
    settings = config(parallel={"dp_shard": 64})
    hidden, shown = step(settings), step(settings, rates=replace(DEFAULT_RATES, overlap=1e-9))
    assert shown.parts["data parallel"] == pytest.approx(hidden.parts["data parallel"] + hidden.hidden, rel=1e-6)
    assert shown.hidden == pytest.approx(0.0, abs=1e-6)


def test_a_slower_network_is_slower() -> None:
    times = [
        step(config(micro_batch=4, batch=256, parallel={"dp_shard": 64}), network=network).seconds
        for network in ("ib-ndr-400", "ib-hdr-200", "ethernet-100")
    ]
    assert times == sorted(times) and times[2] > 1.2 * times[0]
    inside = config(parallel={"dp_shard": 8})
    assert step(inside, network="ethernet-100").seconds == step(inside, network="ib-ndr-400").seconds


def test_stages_1_and_2_hide_nothing() -> None:
    for stage in (1, 2):
        settings = config(engine={"name": "zero", "zero_stage": stage}, parallel={"dp_shard": 8})
        assert step(settings).hidden == 0.0


def test_work_that_is_not_split() -> None:
    """The encoder is shared out by samples, rounded up; the projector runs on every rank."""
    settings = config(parallel={"dp_shard": 2, "sp": 2, "tp": 2})
    shares = {part: share_of(part, settings, 6) for part in ("encoder", "projector", "connector", "DiT")}
    assert shares == {"encoder": 2, "projector": 6, "connector": 3, "DiT": 1.5}


def test_offloading_is_paid_for() -> None:
    engine = {"name": "fsdp2", "offload_optimizer": True}
    settings = config(engine=engine, parallel={"dp_shard": 8})
    there = step(settings).parts["optimizer"]
    here = step(config(engine={"name": "fsdp2"}, parallel={"dp_shard": 8})).parts["optimizer"]
    assert there > 20 * here


def test_hosts_that_decode_too_slowly() -> None:
    settings = config(parallel={"dp_shard": 64})
    free = step(settings)
    bound = step(settings, loader_rate=10.0)
    assert bound.seconds == pytest.approx(1024 / (10.0 * 8))
    assert step(settings, loader_rate=1e6).parts == free.parts


@pytest.mark.parametrize(("stage", "part"), [("decoder", "decoder"), ("encoder", "encoder")])
def test_other_stages(stage: str, part: str) -> None:
    settings = Config.model_validate(
        {
            "stage": stage,
            "model": {"encoder": {"name": "siglip-demo"}, "decoder": {"name": "vit-tiny"}},
            "optim": {"groups": {stage: {"lr": 1e-4}}},
            "engine": {"name": "zero"},
            "parallel": {"dp_shard": 8},
        }
    )
    found = step(settings)
    assert found.parts[part] > 0 and found.seconds < 0.1
    assert usual_samples(settings).labelled == 0


def test_another_number_of_gpus_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"makes 8 ranks, but the cluster has 16 GPUs; choose sizes whose product is 16"
    ):
        plan_step(config(parallel={"dp_shard": 8}), find_cluster("h200", 16))


def test_planning_again_builds_and_runs_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, cluster = config(parallel={"dp_shard": 16, "sp": 2, "tp": 2}), find_cluster("h200", 64)
    plan_step(settings, cluster)
    with nothing_new(monkeypatch):
        for micro_batch in (1, 2, 4, 8, 16):
            plan_step(settings, cluster, micro_batch=micro_batch)
