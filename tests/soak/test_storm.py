"""Eight kills of each kind of training, and as many as a launcher takes in its stride. `make soak` has fifty."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STORM = Path(__file__).parent / "storm.py"
TIMEOUT_SECONDS = 600


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.parametrize("engine", ["fsdp2", "zero"])
def test_killed_eight_times(engine: str, tmp_path: Path) -> None:
    run_storm("--kills", "8", "--seed", "1", "--engine", engine, "--folder", str(tmp_path))


@pytest.mark.long
@pytest.mark.dist
def test_the_launcher_survives_kills(tmp_path: Path) -> None:
    run_storm("--launch", "--kills", "4", "--seed", "1", "--engine", "fsdp2", "--folder", str(tmp_path))


def run_storm(*options: str) -> None:
    command = [sys.executable, str(STORM), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
