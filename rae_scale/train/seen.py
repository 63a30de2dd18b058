"""What a step of a run trained on, found again from its settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rae_scale.config import Config
from rae_scale.config.paths import resolve_paths
from rae_scale.data.looking.preview import step_tiles
from rae_scale.data.looking.sheet import Tile
from rae_scale.train.guard.skipped_data import FILE, read_file
from rae_scale.train.meta import build_parts_on_meta, without_weights


def tiles_of_step(config: Config, step: int, count: int) -> Iterator[Tile]:
    """The first `count` samples of `step` as the log counts it (1 is the first), with what the run in `run.dir` left
    out taken into account. Models are built without weights: the stage decides which samples it can use.

    Raises ValueError for sources or settings that the run could not begin with.
    """
    resolved = without_weights(resolve_paths(config))
    batches = build_parts_on_meta(resolved).batches
    return step_tiles(
        resolved.data,
        seed=config.run.seed,
        image_size=batches.image_size,
        prepare=batches.prepare,
        batch=read_file(Path(config.run.dir) / FILE).batch_of(step - 1),
        count=count,
    )
