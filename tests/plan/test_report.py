"""Reports and pictures of plans and searches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rae_scale.config import Config
from rae_scale.plan.chart import memory_chart
from rae_scale.plan.hardware import find_cluster
from rae_scale.plan.memory import MemoryPlan
from rae_scale.plan.plan import Plan, make_plan
from rae_scale.plan.report import GIB, grid, report, search_json, search_report, time_words
from rae_scale.plan.search import Found, Refusal, Search

PHASES = {"forward": {"weights": 10 * GIB, "activations": 4 * GIB}, "optimizer": {"weights": 10 * GIB}}
MEMORY = MemoryPlan(PHASES, GIB, {})


@pytest.fixture(scope="module")
def plan() -> Plan:
    config = Config.model_validate(
        {
            "model": {"name": "dit-0.5b"},
            "engine": {"name": "fsdp2", "activation_checkpointing": "full"},
            "parallel": {"dp_shard": 8, "tp": 2},
            "data": {"micro_batch_size": 16},
        }
    )
    return replace(make_plan(config, find_cluster("h100-80g", 16)), memory=MEMORY)


def line_of(text: str, start: str) -> str:
    (found,) = (line.strip() for line in text.splitlines() if line.strip().startswith(start))
    return found


def test_every_part_of_a_plan_is_in_its_report(plan: Plan) -> None:
    text = report(plan)
    assert "pretrain of dit-0.5b and qwen2.5-1.5b on 16 x NVIDIA H100 80GB HBM3, 2 nodes joined by ib-ndr-400" in text
    assert "fsdp2, dp_replicate 1 x dp_shard 8 x sp 1 x tp 2; bf16, activation checkpointing full" in text
    assert "global batch 2,048 = 8 ranks x 16 micro-steps x 16 samples of 352 tokens" in text
    assert line_of(text, "weights").split() == ["weights", "10.0", "10.0"]
    assert line_of(text, "activations").split() == ["activations", "4.0", "0.0"]
    assert "highest in forward: 14.0 + 1.0 margin = 15.0 of 79.1 GiB" in text
    assert line_of(text, "layers: all_reduce over tp (2 ranks)").endswith("NVLink")
    assert f"{plan.step.images_per_s:,.1f} images/s" in text and f"MFU {plan.step.mfu:.1%}" in text
    assert f"{plan.duration.gpu_hours:,.0f} GPU-hours" in text and "run.save_every=1000 is" in text
    assert "rates: defaults, not measured on this machine" in text


def test_what_does_not_fit_is_said_loudly(plan: Plan) -> None:
    assert "fits: 64.1 GiB to spare" in report(plan)
    small = replace(plan, cluster=find_cluster("a100-40g", 16), memory=replace(MEMORY, margin=30 * GIB))
    assert "DOES NOT FIT: 4.7 GiB too much" in report(small)


def test_a_picture(plan: Plan, tmp_path: Path) -> None:
    memory_chart(plan, tmp_path / "pictures/memory.png")
    assert (tmp_path / "pictures/memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_and_its_refusals(plan: Plan) -> None:
    base, found = plan.config.model_copy(update={"parallel": plan.config.parallel.model_copy(update={"tp": 1})}), plan
    refusal = Refusal(3, "too many heads", plan.config)
    search = Search(base, plan.cluster, (Found(found.config, found.step, MEMORY),), (refusal,), slower=2)
    text = search_report(search)
    assert text.startswith("6 layouts for pretrain of dit-0.5b on 16 x NVIDIA H100 80GB HBM3, global batch 2,048")
    row = line_of(text, f"{plan.step.images_per_s:,.1f}").split()
    assert row[3:12] == ["15.0", "fsdp2", "1", "x", "8", "x", "1", "x", "2"] and "2 more are valid" in text
    assert "the first of them: parallel.tp=2" in text
    assert "3 layouts, such as fsdp2, dp_replicate 1 x dp_shard 8 x sp 1 x tp 2: too many heads" in text
    data = search_json(search)
    assert data["layouts"] == 6 and data["fits"][0]["overrides"] == ["parallel.tp=2"]
    assert data["fits"][0]["spare_bytes"] == plan.spare
    nothing = search_report(replace(search, fits=(), refused=()))
    assert "none fits" in nothing and nothing.endswith("refused\n  nothing")


def test_words() -> None:
    assert [time_words(seconds) for seconds in (0.25, 90, 7200, 36 * 3600)] == ["0.2 s", "1.5 min", "2.0 h", "1.5 days"]
    lines = list(grid([["name", "n"], ["a", "1"], ["bcdef", "1,000"]]))
    assert lines == ["name       n", "a          1", "bcdef  1,000"]
