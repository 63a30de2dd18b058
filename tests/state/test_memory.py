"""Saving and resharding hold a tensor or a buffer in memory, not a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_memory_is_bounded_by_tensor_and_buffer_and_not_by_the_model(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, str(Path(__file__).with_name("memory.py")), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    largest, buffer = measured["largest"], measured["buffer"]
    assert measured["total"] >= 48 * largest
    assert measured["save"] <= 3 * largest, measured
    assert measured["buffered"] <= buffer + 3 * largest < measured["total"] / 5, measured
    assert measured["reshard"] <= 3 * largest, measured
