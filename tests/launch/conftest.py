from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[..., Path]


@pytest.fixture
def run_file(tmp_path: Path) -> Write:
    """Write a run file like the demo's: layout and batch by keyword."""

    def write(dp_shard: int = 1, global_batch_size: int = 8, **parallel: int) -> Path:
        tree = {
            "stage": "pretrain",
            "run": {"dir": str(tmp_path / "run"), "device": "cpu"},
            "model": {"name": "dit-tiny", "llm": {"name": "qwen2-tiny"}},
            "data": {"sources": [{"path": "data"}], "global_batch_size": global_batch_size},
            "optim": {"groups": {"llm": {"lr": 1e-3}, "dit": {"lr": 1e-3}}},
            "engine": {"name": "fsdp2", "precision": "fp32"},
            "parallel": {"dp_shard": dp_shard, **parallel},
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def write_status(run_dir: Path, state: str, step: int, attempt: int = 1, reason: str = "") -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    told = {"state": state, "step": step, "max_steps": 9, "reason": reason, "world_size": 1, "attempt": attempt}
    (run_dir / "status.json").write_text(json.dumps(told | {"time": 0.0}))
