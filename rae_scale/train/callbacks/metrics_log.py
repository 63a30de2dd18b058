"""`metrics.jsonl` in the run's folder: one JSON object per step, always. `skipped.jsonl`: one per skipped step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rae_scale.train.callbacks.base import Callback, Metrics
from rae_scale.train.guard.lines import LineFile

if TYPE_CHECKING:
    from rae_scale.train.loop import Run


class MetricsLog(Callback):
    """Append a line per step, numbers in full precision.

    After a resume or a rollback the steps that will be done again are dropped from both files: each step is there once.
    Skips in data that a rollback has left out stay: they are why, and will not be met again.
    """

    def __init__(self) -> None:
        self.metrics: LineFile | None = None
        self.skips: LineFile | None = None

    def on_train_start(self, run: Run) -> None:
        def stays(line: dict[str, Any]) -> bool:
            return line["step"] <= run.step

        def skip_stays(line: dict[str, Any]) -> bool:
            return stays(line) or run.skipped_data.leaves_out(line["batch"])

        keep_lines(run.folder / "metrics.jsonl", stays)
        keep_lines(run.folder / "skipped.jsonl", skip_stays)
        self.metrics = LineFile(run.folder / "metrics.jsonl")
        self.skips = LineFile(run.folder / "skipped.jsonl")

    def on_rollback(self, run: Run) -> None:
        self.close()
        self.on_train_start(run)

    def on_skip(self, run: Run, entry: dict[str, Any]) -> None:
        assert self.skips is not None
        self.skips.write(entry, run)

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        assert self.metrics is not None
        self.metrics.write(metrics, run)

    def close(self) -> None:
        for file in (self.metrics, self.skips):
            if file is not None:
                file.close()


def keep_lines(path: Path, stays: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the other lines, and a last one that a killed process left unfinished. Replaced in one piece."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and stays(json.loads(line))]
    if len(kept) == len(lines):
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
