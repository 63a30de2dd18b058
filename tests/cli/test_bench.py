"""`rae-scale bench` on a CPU at tiny sizes: it runs, prints a table, and writes what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


def test_kernels(rae: Callable[..., str], tmp_path: Path) -> None:
    sizes = ("--tokens", 64, "--hidden", 64, "--head-dim", 32, "--repeats", 2, "--small", "--device", "cpu")
    printed = rae("bench", "kernels", *sizes, "--against", "eager", "--only", "swiglu", "--out", tmp_path)
    assert "| swiglu | eager | backward |" in printed
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert {"torch", "commit", "triton", "device"} <= set(found["environment"])
    assert len(found["timings"]) == 4 and all(row["within_twice"] for row in found["checks"])
    assert (tmp_path / "kernels.md").read_text().startswith("## Operations")


def test_attention(rae: Callable[..., str], tmp_path: Path) -> None:
    sizes = ("--shape", "2x32", "--tokens", 64, "--total-tokens", 128, "--repeats", 2, "--device", "cpu")
    assert "| 64 | 2 x 32 | 2 | ours |" in rae("bench", "attention", *sizes, "--out", tmp_path)
    rows = json.loads((tmp_path / "attention.json").read_text())["timings"]
    refused = {row["backend"] for row in rows if "refused" in row}
    assert "cudnn" in refused and "ours" not in refused


def test_step(rae: Callable[..., str], tmp_path: Path) -> None:
    sizes = ("--model", "dit-tiny", "--batch", 2, "--repeats", 2, "--small", "--device", "cpu")
    printed = rae("bench", "step", "engine.precision=fp32", *sizes, "--out", tmp_path)
    assert "## Step of dit-tiny" in printed and "no peak is stated for this device" in printed
    assert json.loads((tmp_path / "step.json").read_text())["settings"]["overrides"] == ["engine.precision=fp32"]


def test_mistakes_are_one_line(rae: Callable[..., str]) -> None:
    assert "--profile writes a trace" in rae("bench", "step", "--profile", status=2)
    assert "--shape='32': write heads and head dimension as 32x64" in rae(
        "bench", "attention", "--shape", "32", status=2
    )
    assert "--head-dim=48 does not divide --hidden=64" in rae(
        "bench", "kernels", "--hidden", 64, "--head-dim", 48, "--small", "--device", "cpu", status=2
    )
