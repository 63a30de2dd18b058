"""GenEval's folder layout: OUT/00000/metadata.jsonl, OUT/00000/samples/0000.png, and OUT/results.jsonl.

`held_out` prompts go to OUT/held_out in the same layout: GenEval's own scripts take only folders named by digits, so
they score the six tasks alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rae_scale.data.shapes.checker import Detection, Verdict
from rae_scale.data.shapes.prompts import HELD_OUT, Prompt


class GenEvalFolder:
    """Collects pictures as they are made; `finish` writes the results, so a folder without them is incomplete.

    Raises:
        ValueError: the folder is not empty; pictures of two runs would be scored as one.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and any(path.iterdir()):
            raise ValueError(
                f"{path} is not empty, and pictures of two runs would mix there; use a new or empty folder"
            )
        self.path = path
        self._results: dict[str, list[dict[str, Any]]] = {"": [], HELD_OUT: []}
        self._prompts = {"": 0, HELD_OUT: 0}

    def add(
        self,
        prompt: Prompt,
        sample: int,
        image: NDArray[np.uint8],
        objects: list[Detection],
        verdict: Verdict,
        seed: int,
    ) -> None:
        """Write one picture (uint8 `[S, S, 3]`); samples of a prompt come in order, 0 first."""
        part = HELD_OUT if prompt.tag == HELD_OUT else ""
        self._prompts[part] += sample == 0
        root = self.path / part
        name = Path(f"{self._prompts[part] - 1:05d}") / "samples" / f"{sample:04d}.png"
        metadata = json.dumps(prompt.metadata())
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).parent.with_name("metadata.jsonl").write_text(metadata + "\n")
        Image.fromarray(image).save(root / name)
        details: dict[str, list[list[float]]] = {}
        for item in objects:
            details.setdefault(item.shape, []).append([*item.box, item.score])
        self._results[part].append(
            {
                "filename": str(name),
                "tag": prompt.tag,
                "prompt": prompt.caption,
                "correct": verdict.correct,
                "reason": verdict.reason,
                "metadata": metadata,
                "details": json.dumps(details),
                "seed": seed,
            }
        )

    def finish(self, report: dict[str, Any], table: str) -> None:
        """Write results.jsonl of both parts, and the report as report.json and report.txt."""
        for part, results in self._results.items():
            lines = "".join(json.dumps(result) + "\n" for result in results)
            (self.path / part / "results.jsonl").write_text(lines)
        (self.path / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (self.path / "report.txt").write_text(table + "\n")
