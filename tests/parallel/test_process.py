"""What a process of a launched run does first."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rae_scale.parallel.process import settle

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), flush=True)
time.sleep(60)
"""
CHILD = """
import os, time
from rae_scale.parallel.process import settle
settle(0)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_it_dies_with_its_launcher() -> None:
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        child = Path("/proc") / launcher.stdout.readline().strip()
        assert child.exists()
        launcher.kill()
        deadline = time.monotonic() + 20
        while child.exists() and "\nState:\tZ" not in (child / "status").read_text():
            assert time.monotonic() < deadline, "it has outlived its launcher"
            time.sleep(0.01)


@pytest.mark.parametrize("given", ["", "/scratch/triton"])
def test_each_process_has_its_own_kernel_cache(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", given)
    monkeypatch.setattr("rae_scale.parallel.process.die_with_launcher", lambda: None)
    base = given or str(Path.home() / ".triton" / "cache")
    settle(3)
    once = os.environ["TRITON_CACHE_DIR"]
    assert Path(once).parent == Path(base)
    assert once.endswith("-3")
    settle(3)
    assert os.environ["TRITON_CACHE_DIR"] == once
