"""How large a checkpoint is and whether the disk has room for it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from rae_scale.engines import Engine
from rae_scale.parallel import Mesh
from rae_scale.state.format import CHECKPOINTS, step_folders

logger = logging.getLogger(__name__)
FLOAT32_BYTES = 4
GB = 10**9


def checkpoint_bytes(engine: Engine, mesh: Mesh) -> int:
    """Of the tensors of a whole checkpoint, which is all but a little of it. Collective."""
    ours = sum(piece.box.numel for piece in engine.pieces()) * FLOAT32_BYTES
    return sum(mesh.gather_objects(ours))


def free_bytes(folder: Path) -> int:
    """On the disk that `folder` is or will be on. Quotas do not show."""
    return shutil.disk_usage(existing_folder(folder)).free


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest of the folders around it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def warn_if_short(run_dir: Path, size: int, count: int) -> bool:
    """Warn if there is no room for `count` checkpoints of `size` bytes beside those that are there, and say whether
    there is none."""
    free = free_bytes(run_dir)
    short = free < size * count
    if short:
        logger.warning(
            "the disk of %s has %.3g GB free, and %d checkpoint(s) of %.3g GB more will be written to it: make room, "
            "lower run.keep_last or set run.keep_every, or choose another run.dir",
            run_dir,
            free / GB,
            count,
            size / GB,
        )
    return short


def to_come(run_dir: Path, keep_last: int) -> int:
    """How many more checkpoints there will be at once: the newest is complete before the oldest is removed."""
    return max(1, keep_last + 1 - len(step_folders(run_dir / CHECKPOINTS)))
