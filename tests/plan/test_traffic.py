"""Planned traffic is what real runs of the same configuration send, to the byte and to the call."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from known import nothing_new
from recorded import TENSOR_PARALLEL, Recorded, config_of, models, record

from rae_scale.config import Config
from rae_scale.engines.zero_gathers import zero3_gathers
from rae_scale.plan.links import Span
from rae_scale.plan.models import recorded_calls
from rae_scale.plan.traffic import Traffic, Transfer, engine_transfers, plan_traffic

FSDP2 = [
    TENSOR_PARALLEL,
    {"parallel": {"sp": 2}, "precision": "bf16", "activation_checkpointing": "selective"},
    {"parallel": {"dp_shard": 2}, "precision": "fp32", "micro_steps": 2, "ddt": False, "llm_trains": False},
]
ZERO = [
    {"parallel": {"dp_shard": 2}, "precision": "bf16", "zero_stage": 3, "activation_checkpointing": "full"},
    {"parallel": {"dp_shard": 2}, "precision": "fp32", "zero_stage": 3, "micro_steps": 3, "llm_trains": False},
    {"parallel": {"tp": 2}, "precision": "fp32", "zero_stage": 3},
    {"parallel": {"sp": 2}, "precision": "fp32", "zero_stage": 2},
    {"parallel": {"dp_shard": 2}, "precision": "bf16", "zero_stage": 1, "micro_steps": 2},
]


@pytest.fixture(autouse=True)
def awkward_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for table, name, value in models():
        monkeypatch.setitem(table, name, value)


def check(settings: dict[str, Any], found: Recorded) -> Traffic:
    plan = plan_traffic(config_of(**settings), 8, found.samples)
    assert plan.volume() == found.volume, (settings, sorted(plan.volume().items()), sorted(found.volume.items()))
    return plan


def check_calls(plan: Traffic, found: Recorded) -> None:
    planned: Counter[tuple[str, str]] = Counter()
    for transfer in plan.transfers:
        planned[transfer.kind, transfer.group] += transfer.calls
    assert planned == found.calls


@pytest.mark.dist
def test_fsdp2(two_ranks: tuple[Recorded, Path, dict[str, Any]]) -> None:
    found = two_ranks[0]
    check_calls(check({"name": "fsdp2", **TENSOR_PARALLEL}, found), found)


@pytest.mark.long
@pytest.mark.dist
def test_fsdp2_with_transformers(tmp_path: Path) -> None:
    for settings, found in zip(FSDP2, run_ranks(record, 2, tmp_path, ("fsdp2", FSDP2))[0], strict=True):
        check_calls(check({"name": "fsdp2", **settings}, Recorded(*found)), Recorded(*found))


@pytest.mark.long
@pytest.mark.dist
def test_zero(tmp_path: Path) -> None:
    """Its calls depend on buckets and are not exact."""
    for settings, found in zip(ZERO, run_ranks(record, 2, tmp_path, ("zero", ZERO))[0], strict=True):
        check({"name": "zero", **settings}, Recorded(*found))


def config(engine: str, **parallel: int) -> Config:
    return Config.model_validate({"engine": {"name": engine}, "parallel": parallel, "data": {"micro_batch_size": 8}})


def phases(transfers: tuple[Transfer, ...], kind: str) -> dict[str, Transfer]:
    return {transfer.phase: transfer for transfer in transfers if transfer.kind == kind}


def test_what_overlaps_with_what() -> None:
    """FSDP2 gathers for forward and again, but for its root, for backward; DeepSpeed's stages 1 and 2 wait."""
    settings = config("fsdp2", dp_shard=8)
    transfers = plan_traffic(settings, 8).transfers
    gathers = phases(transfers, "all_gather")
    assert gathers["forward"].payload > gathers["backward"].payload > 0.8 * gathers["forward"].payload
    units, micro_steps = 32 + 28 + 1, settings.data.global_batch_size // 8 // 8
    assert (gathers["forward"].calls, gathers["backward"].calls) == (micro_steps * units, micro_steps * (units - 1))
    assert {phase: found.calls for phase, found in phases(transfers, "reduce_scatter").items()} == {"backward": units}
    changed = config("zero", dp_shard=8).model_dump()
    changed["engine"]["zero_stage"] = 2
    assert {transfer.phase for transfer in plan_traffic(Config.model_validate(changed), 8).transfers} == {"step"}


def test_spans_and_bytes_between_nodes() -> None:
    """Two replicas of 8 ranks: the shards stay on their node, only the sum over replicas leaves it."""
    plan = plan_traffic(config("fsdp2", dp_replicate=2, dp_shard=8), 8)
    spans = {transfer.group: transfer.span for transfer in plan.transfers}
    assert spans["shard"] == Span(8, 8) and spans["replicate"] == Span(2, 1)
    (over,) = [transfer for transfer in plan.transfers if transfer.group == "replicate"]
    assert plan.crossing == over.crossing == over.sent == over.payload
    assert plan.sent > plan.crossing
    assert not plan_traffic(config("eager"), 8).transfers


def test_bounds_are_named() -> None:
    settings = config("zero", dp_shard=16).model_dump()
    settings["engine"] |= {"zero_hpz": 8}
    (note,) = plan_traffic(Config.model_validate(settings), 8).notes
    assert note.startswith("engine.zero_hpz=8: gathers are counted as without it")
    settings = config("fsdp2", tp=2).model_dump()
    settings["engine"] |= {"activation_checkpointing": "selective", "saved_ops": {"communication": 2}}
    (note,) = plan_traffic(Config.model_validate(settings), 8).notes
    assert "upper bound" in note
    assert plan_traffic(config("fsdp2", tp=2), 8).notes == ()


def test_an_impossible_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel.tp=4 does not divide"):
        plan_traffic(config("fsdp2", tp=4), 8)


def test_micro_steps_that_repeat_are_not_replayed() -> None:
    """Many micro-steps of stage 3 cost what a few do, and count as if each had been replayed."""
    calls = recorded_calls("pretrain", config("zero", dp_shard=8).model, True)
    numels = {name: 150_000 for call in walk(calls) for name in call.parameters}
    one, two, many = (zero3_gathers(calls, numels, micro_steps=steps) for steps in (1, 2, 500))
    assert many == {name: count + 499 * (two[name] - one[name]) for name, count in one.items()}


def walk(call: Any) -> list[Any]:
    return [call, *(each for child in call.children for each in walk(child))]


def test_a_layout_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = [config("fsdp2", dp_shard=32, tp=2), config("zero", dp_shard=64)]
    for layout in layouts:
        plan_traffic(layout, 8)
    worked_out = engine_transfers.cache_info().misses
    with nothing_new(monkeypatch):
        for layout in layouts:
            plan_traffic(layout, 8)
    assert engine_transfers.cache_info().misses == worked_out
