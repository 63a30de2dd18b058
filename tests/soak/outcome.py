"""What two runs of the same training have in common, whatever happened to them on the way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Names in metrics.jsonl that depend on the clock or the machine.
TIMED = ("_s", "_per_second", "tflops", "mfu", "memory_bytes", "effective_time")

Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """
    curve:  every line of metrics.jsonl, but for what depends on the clock: losses, norms, learning rates, skips.
    files:  of the newest checkpoint, by name: every rank's weights, moments and moving average, as they lie on disk.
    """

    curve: list[Row]
    files: dict[str, bytes]


def outcome(run_dir: Path) -> Outcome:
    return Outcome(curve(run_dir), checkpoint_files(run_dir))


def metrics(run_dir: Path) -> list[Row]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(run_dir: Path) -> list[Row]:
    return [{name: value for name, value in line.items() if not name.endswith(TIMED)} for line in metrics(run_dir)]


def checkpoint_files(run_dir: Path) -> dict[str, bytes]:
    checkpoints = run_dir / "checkpoints"
    folder = checkpoints / (checkpoints / "latest").read_text(encoding="utf-8").strip()
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("rank-*.safetensors"))}
    assert files, f"{folder} holds no tensors"
    return files


def differences(ours: Outcome, theirs: Outcome) -> list[str]:
    """Where two outcomes differ, in words; empty if they are bitwise equal."""
    found = []
    if len(ours.curve) != len(theirs.curve):
        found.append(f"metrics.jsonl has {len(ours.curve)} lines and not {len(theirs.curve)}")
    for mine, other in zip(ours.curve, theirs.curve, strict=False):
        if mine != other:
            names = sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))
            values = (f"{name} {mine.get(name)} and not {other.get(name)}" for name in names)
            found.append(f"first at step {other['step']}: {', '.join(values)}")
            break
    for name in sorted(ours.files.keys() | theirs.files.keys()):
        if ours.files.get(name) != theirs.files.get(name):
            found.append(f"{name} of the newest checkpoint differs")
    return found
