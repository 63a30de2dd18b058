"""What the driver says, read from what nvidia-smi prints."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rae_scale.preflight import gpu
from rae_scale.preflight.gpu import GPUFacts, allocatable, gpu_facts, other_processes

CUDA = torch.device("cuda", 0)
STATE = ["41", "500.00", "700.00", "3", "8", None]
LIMIT = 70 * 10**9


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that gives at most `LIMIT` bytes, and a driver of the older kind."""
    answers: dict[str, list[str | None]] = {
        gpu.STATE[0]: STATE,
        gpu.ROWS[0]: ["Yes", "No"],
        gpu.REASONS[0]: [None],
        gpu.REASONS[1]: ["0x0000000000000020"],
    }
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", uuid="1-2")

    def empty(size: int, **_: Any) -> None:
        if size > LIMIT:
            raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(gpu, "nvidia_smi", lambda _, *fields: answers[fields[0]])
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (79 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name; a test writes what it prints."""
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\nexit 9\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return script


@pytest.mark.usefixtures("a_gpu")
def test_facts(nvidia_smi: Path) -> None:
    nvidia_smi.write_text("#!/bin/sh\nprintf 'GPU-1-2, 77, 9000\\nGPU-3-4, 78, 5\\n'\n")
    found = gpu_facts(CUDA)
    assert LIMIT * 0.95 < found.allocatable <= LIMIT
    assert found == GPUFacts(
        "NVIDIA H100 80GB HBM3",
        memory_total=80 * 10**9,
        memory_free=79 * 10**9,
        allocatable=found.allocatable,
        slowdowns=("too hot (software)",),
        temperature=41.0,
        power_limit=500.0,
        power_default=700.0,
        ecc_errors=3.0,
        pcie_width=8.0,
        pcie_width_max=None,
        rows_pending=True,
        rows_failed=False,
        others=("pid 77 (9000 MiB)",),
    )


@pytest.mark.usefixtures("a_gpu")
def test_memory_that_cannot_be_had_at_all() -> None:
    assert allocatable(CUDA, 0) == 0
    assert LIMIT - gpu.STEP <= allocatable(CUDA, LIMIT) <= LIMIT


@pytest.mark.usefixtures("nvidia_smi")
def test_a_broken_driver_has_no_processes() -> None:
    assert other_processes("GPU-1-2") == ()
