"""What a trace of few blocks says of a deeper model is what a trace of all its blocks says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from rae_scale.config import Config
from rae_scale.models import llm_zoo, zoo
from rae_scale.models.ddt import DDTHeadConfig
from rae_scale.models.dit import DiTConfig
from rae_scale.models.llm_zoo import LLMSpec
from rae_scale.plan import trace as traces
from rae_scale.plan.hollow import NoValues
from rae_scale.plan.skeleton import planned_module
from rae_scale.plan.timeline import Timeline
from rae_scale.plan.trace import Key, key_of, trace, without_values
from rae_scale.plan.unroll import Moment, unroll

DEPTH = 5
DIT = DiTConfig(64, hidden_size=48, depth=DEPTH, num_heads=4, z_channels=40, grid_size=4, ddt=DDTHeadConfig(64, 3, 4))
LLM = LLMSpec(32, 4, 4, 2, 64, 300, tie_word_embeddings=True)
FLOAT32 = 4


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(zoo.DIT_ZOO, "dit-deep", DIT)
    monkeypatch.setitem(llm_zoo.LLM_ZOO, "qwen2-deep", LLM)
    yield
    forget()


def forget() -> None:
    for cached in (trace, traces.few_blocks):
        cached.cache_clear()


def key(micro_batch: int = 3, kernels: Any = "auto", **changes: Any) -> Key:
    engine = {"name": "eager", "precision": "fp32"} | changes.pop("engine", {})
    config = Config.model_validate(
        {
            "model": {"name": "dit-deep", "llm": {"name": "qwen2-deep"}, "encoder": {"name": "siglip-demo"}},
            "engine": engine,
            **changes,
        }
    )
    return key_of(config, micro_batch, 24, 4, kernels)


CASES = {
    "nothing checkpointed": key(),
    "full": key(engine={"activation_checkpointing": "full"}),
    "selective, in bfloat16": key(engine={"activation_checkpointing": "selective", "precision": "bf16"}),
    "plain PyTorch": key(kernels="reference"),
    "on a CPU": key(run={"device": "cpu"}),
    "sharded, in bfloat16": key(engine={"name": "fsdp2", "precision": "bf16"}),
    "tensor parallel": key(parallel={"tp": 2}),
    "sequence parallel": key(parallel={"sp": 2}, engine={"activation_checkpointing": "full"}),
}


QUICK = ("nothing checkpointed", "selective, in bfloat16", "sequence parallel")
REST = [name for name in CASES if name not in QUICK]


@pytest.mark.parametrize("which", [*QUICK, *(pytest.param(each, marks=pytest.mark.long) for each in REST)])
def test_unrolled_blocks_are_those_of_the_deep_model(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, at every moment."""
    ours = unroll(trace(CASES[which]))
    forget()
    monkeypatch.setattr(traces, "BLOCKS", 99)
    whole = trace(CASES[which])
    names = [moment.bytes.name for moment in ours]
    assert [replace(moment.bytes, kept=0) for moment in ours] == [
        replace(interval, name=name, kept=0) for interval, name in zip(whole.intervals, names, strict=True)
    ]
    assert [moment.number for moment in ours if moment.unit == "DiT" and moment.phase == "backward"] == [4, 3, 2, 1, 0]


def test_full_checkpointing_keeps_the_input_of_a_block() -> None:
    moments = unroll(trace(CASES["full"]))
    inside = [m.bytes for m in moments if m.unit == "DiT" and m.phase == "forward"]
    residual = FLOAT32 * 3 * DIT.num_tokens * DIT.hidden_size
    assert {each.stop - each.start for each in inside} == {residual}
    assert sum(m.bytes.gradients for m in moments) == FLOAT32 * trained()


def trained() -> int:
    module, _ = planned_module(Config(model=CASES["full"].model))
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_the_timeline_counts_what_operators_leave() -> None:
    layer = nn.Linear(10, 20, bias=False, device="meta")
    without_values(layer)
    timeline = Timeline(layer, opens=False)
    with timeline.recording(), NoValues():
        x = torch.ones(5, 10)
        timeline.mark("forward")
        loss = layer(x).square().sum()
        timeline.mark("backward")
        loss.backward()
    begin, forward, backward = timeline.intervals
    assert begin.stop == x_bytes == forward.start
    assert forward.stop == x_bytes + FLOAT32 * (5 * 20 + 1)
    assert backward.gradients == FLOAT32 * 200
    assert backward.with_gradients >= backward.stop + FLOAT32 * 200


x_bytes = FLOAT32 * 5 * 10


def test_operators_are_opened_where_no_kernel_runs_them() -> None:
    """The formulas of a CPU make results on their way that a kernel keeps in registers."""
    kernel, formula = (unroll(trace(CASES[which])) for which in ("nothing checkpointed", "on a CPU"))
    assert highest(formula, "backward") > highest(kernel, "backward")


def highest(moments: list[Moment], phase: str) -> int:
    return max(moment.bytes.peak for moment in moments if moment.phase == phase)
