from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_world import TinyWorld

from rae_scale.train import dry_run


def test_it_describes_the_run_and_writes_nothing(world: TinyWorld, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"parallel__dp_shard": 2, "engine__name": "zero", "data__micro_batch_size": 2}
    report = dry_run(world.config(tmp_path / "run", run__max_steps=10, model__llm__train=False, **changes))
    assert "engine zero stage 3, fp32" in report
    assert "global batch 8 = 2 ranks x 2 micro-steps x 2 samples" in report
    assert "trained in group dit: 120,432 parameters" in report
    assert "trained in group llm: 768 parameters" in report  # 16 queries of width 48
    assert "40 samples, 100.0% of the mixture" in report
    assert "samples to be seen: 80 (2.00 x the data)" in report
    assert "FLOPs per step" in report
    assert not (tmp_path / "run").exists()


def test_stages_without_text_have_no_token_count(world: TinyWorld, tmp_path: Path) -> None:
    report = dry_run(world.config(tmp_path, stage="decoder", data__lanes=8))
    assert "trained in group decoder" in report and "tokens per step" not in report


def test_published_sizes_need_no_weights_and_no_memory(world: TinyWorld, tmp_path: Path) -> None:
    sizes = {"model__name": "dit-9.8b", "model__encoder": {"name": "siglip2-so400m", "path": "nowhere/siglip2"}}
    llm = {"model__llm__name": "qwen2.5-1.5b", "model__llm__path": "nowhere/qwen", "data__max_seq_len": 512}
    report = dry_run(world.config(tmp_path, **sizes, **llm))
    assert "frozen encoder: 412,440,048 parameters" in report
    assert "trained in group dit: 9,767,830,656 parameters" in report


def test_sizes_that_the_model_does_not_allow_are_refused_before_it_is_built(world: TinyWorld, tmp_path: Path) -> None:
    changes = {"engine__name": "fsdp2", "parallel__sp": 3, "parallel__tp": 4, "model__encoder__path": "nowhere"}
    with pytest.raises(
        ValueError, match=r"tp x sp = 4 x 3 = 12 .*\n.*parallel\.tp=4 does not divide .* 2 key and value"
    ):
        dry_run(world.config(tmp_path, **changes))


def test_missing_data_are_named(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing-here"):
        dry_run(world.config(tmp_path, data__sources=[{"path": str(tmp_path / "nothing-here")}]))


def test_lanes_that_outnumber_a_source_are_refused(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.lanes=64: source 0 has 40 samples"):
        dry_run(world.config(tmp_path, stage="decoder", data__lanes=64, data__global_batch_size=64))
