"""`rae-scale train`: settings, checks without training, and a short run that is continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rae_scale.config import dump_config, load_config
from tests.infer.trained import Trained

Rae = Callable[..., str]


@pytest.fixture
def run_file(trained: Trained, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(trained.world.config(tmp_path / "run", run__max_steps=2)))
    return path


def test_the_printed_config_is_what_would_run(rae: Rae, run_file: Path, tmp_path: Path) -> None:
    printed = rae("train", run_file, "run.max_steps=9", "--print-config")
    (tmp_path / "printed.yaml").write_text(printed)
    assert load_config(tmp_path / "printed.yaml") == load_config(run_file, ["run.max_steps=9"])


def test_a_dry_run_describes_the_run_and_leaves_nothing(rae: Rae, run_file: Path, tmp_path: Path) -> None:
    said = rae("train", run_file, "--dry-run")
    assert "stage pretrain: 2 steps, engine eager, fp32" in said
    assert "40 samples" in said
    assert not (tmp_path / "run").exists()


def test_a_dry_run_finds_missing_data(rae: Rae, run_file: Path, tmp_path: Path) -> None:
    said = rae("train", run_file, f"data.sources=[{{path: {tmp_path / 'no'}}}]", "--dry-run", status=2)
    assert str(tmp_path / "no") in said


def test_training_runs_and_the_same_command_continues(rae: Rae, run_file: Path, tmp_path: Path) -> None:
    rae("train", run_file)
    rae("train", run_file, "run.max_steps=3")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_processes_that_were_not_started_are_named(rae: Rae, run_file: Path) -> None:
    said = rae("train", run_file, "engine.name=zero", "parallel.dp_shard=2", status=2)
    assert "1 process(es) were started" in said
