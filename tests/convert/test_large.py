"""A checkpoint that is larger than memory: little of it in memory at a time, and continued where it was killed. For its
speed beside a plain copy: `python tests/convert/large.py FOLDER`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "large.py"
ROOT = Path(__file__).parents[2]
ROOM_FOR_FLOAT32 = 100e9  # bytes


def run(folder: Path, *options: str, timeout: float) -> dict[str, Any]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    command = [sys.executable, str(PROGRAM), str(folder), *options]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    assert report["message"].startswith("continuing an interrupted conversion")
    assert 0.3 * report["bytes_written"] < report["held_when_killed"] < 0.7 * report["bytes_written"]
    return report


def test_a_small_one(tmp_path: Path) -> None:
    report = run(tmp_path, "--model", "dit-demo", "--ranks", "3", "--moments", "--stretch", "500000", timeout=100)
    assert report["bytes_of_checkpoint"] > 3 * report["bytes_written"] > 2e7


@pytest.mark.long
def test_ten_billion_parameters(tmp_path: Path) -> None:
    """Takes a quarter of an hour on a disk that writes 250 MB/s."""
    dtype = "float32" if shutil.disk_usage(tmp_path).free > ROOM_FOR_FLOAT32 else "bfloat16"
    report = run(tmp_path, "--dtype", dtype, timeout=3600)
    assert report["parameters"] > 10e9
    assert report["peak_bytes"] < 4e9
