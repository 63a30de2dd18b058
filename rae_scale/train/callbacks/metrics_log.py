"""`metrics.jsonl` in the run's folder: one JSON object per step, always."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rae_scale.train.callbacks.base import Callback, Metrics

if TYPE_CHECKING:
    from rae_scale.train.loop import Run


class MetricsLog(Callback):
    """Append a line per step, numbers in full precision.

    On resume the steps that will be done again are dropped, here and from `skipped.jsonl`: each step is there once.
    """

    def __init__(self) -> None:
        self.file: TextIO | None = None

    def on_train_start(self, run: Run) -> None:
        for name in ("metrics.jsonl", "skipped.jsonl"):
            keep_steps_until(run.folder / name, run.step)
        self.file = (run.folder / "metrics.jsonl").open("a", encoding="utf-8")

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        assert self.file is not None
        self.file.write(json.dumps(metrics, allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def keep_steps_until(path: Path, last_step: int) -> None:
    """Drop the lines of later steps, and a last line that a killed process left unfinished. Replaced in one piece."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
    if len(kept) == len(lines):
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
