"""Saying which step was skipped, why, and which samples were in it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from rae_scale.train.loop import Run

logger = logging.getLogger(__name__)
MOST_NAMED = 8
"""How many samples of a step are named where none is beyond doubt."""

Losses = Sequence[tuple[Sequence[str], Tensor]]
"""Per micro-batch of this rank: its sample ids, and their losses [B]."""


def record_skip(run: Run, reason: str, losses: Losses) -> None:
    """Count a step that changed nothing, and say so in the log and to the callbacks, which keep `skipped.jsonl`.

    Named are the samples whose loss is not finite, or if there is none, those with the largest losses. Every rank calls
    this before the step is counted.
    """
    run.skipped += 1
    run.spikes.skip()
    everyone = [sample for ours in run.mesh.gather_objects(worst(losses)) for sample in ours]
    if not run.mesh.is_main:
        return
    named = [sample_id for _, sample_id in suspects(everyone)]
    size = run.config.data.global_batch_size
    entry = {
        "step": run.step + 1,
        "batch": run.batch,
        "reason": reason,
        "positions": [run.batch * size, (run.batch + 1) * size],
        "sample_ids": named,
    }
    logger.warning("step %d skipped: %s; the samples that stand out are %s", run.step + 1, reason, ", ".join(named))
    for callback in run.callbacks:
        callback.on_skip(run, entry)


def worst(losses: Losses) -> list[tuple[float, str]]:
    """(loss, id) of the samples of this rank that could be named. What is not finite is inf."""
    pairs = [
        (value if math.isfinite(value) else math.inf, sample_id)
        for sample_ids, values in losses
        for sample_id, value in zip(sample_ids, values.tolist(), strict=True)
    ]
    return suspects(pairs)


def suspects(pairs: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    """All that are not finite, or if there is none the largest few; once each, for tensor and sequence parallel ranks
    have the same samples."""
    ordered = sorted(set(pairs), key=lambda pair: (-pair[0], pair[1]))
    broken = [pair for pair in ordered if pair[0] == math.inf]
    return broken or ordered[:MOST_NAMED]
