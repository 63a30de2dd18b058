"""Runs interpret_*.py, the Triton kernels on the CPU, in processes of their own: Triton's interpreter is chosen for a
whole process, before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(FOLDER.glob("interpret_*.py")), ids=lambda path: path.stem)
def test_kernels_under_the_interpreter(path: Path):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "RAE_KERNELS": "triton"}
    finished = subprocess.run(command, env=environment, cwd=FOLDER.parent, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-2000:]
    assert "passed" in finished.stdout and "skipped" not in finished.stdout
