"""Finding and loading a checkpoint, into any engine on any mesh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rae_scale.engines import Engine
from rae_scale.parallel import Mesh
from rae_scale.state.agreement import agree
from rae_scale.state.format import (
    CHECKPOINTS,
    LATEST,
    MANIFEST,
    STATE,
    CheckpointError,
    damaged_files,
    read_json,
    replaced_folder,
    step_folders,
    step_of,
)
from rae_scale.state.index import Index, read_index
from rae_scale.state.read import PieceReader


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. Whether its files are intact is not looked at."""
    return next((path for path in candidates(Path(run_dir)) if (path / MANIFEST).is_file()), None)


def candidates(run_dir: Path, up_to: int | None = None) -> list[Path]:
    """The checkpoints of a run that are there, the best to continue first; some may be incomplete.

    up_to: only those of at most so many steps, the newest first.

    The best is the one that `latest` names. A save that was interrupted between giving a checkpoint its name and
    pointing to it has left a complete one that nothing names; it counts if there is no better.
    """
    root = run_dir / CHECKPOINTS
    found = step_folders(root)[::-1]
    if up_to is not None:
        return [path for path in found if (step_of(path) or 0) <= up_to and (path / MANIFEST).is_file()]
    if (root / LATEST).is_file():
        named = root / (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        # A damaged pointer names nothing.
        if step_of(named) is not None:
            found = [named, replaced_folder(named), *(path for path in found if path != named)]
    return [path for path in found if path.is_dir()]


def read_state(path: str | Path) -> dict[str, Any]:
    """What `load_checkpoint` would return, without loading anything."""
    return read_json(Path(path) / STATE)


def load_checkpoint(path: str | Path, engine: Engine, mesh: Mesh, verified: bool = False) -> dict[str, Any]:
    """Put a checkpoint into the engine, whichever engine and mesh wrote it, and return its state. Collective.

    The state holds what `save_checkpoint` was given as `extra`, and "step", "optimizer_step", "layout", "versions".
    verified: the files were compared with their hashes a moment ago, so that is not repeated.

    Raises:
        CheckpointError: on all ranks. A file is missing or damaged, a tensor is missing, too many or of another shape.
    """
    folder = Path(path)
    if not verified:
        agree(mesh, lambda: check_files(folder, mesh.rank, mesh.world_size))
    index, state = read_index(folder), read_state(folder)
    check_tensors(folder, index, engine.shapes)
    with PieceReader(folder, index) as reader:
        engine.load_pieces(reader.read, state["optimizer_step"])
    mesh.barrier()
    return state


def check_files(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Compare every `parts`-th file with its hash, from number `part` on."""
    problems = damaged_files(folder, part, parts)
    if problems:
        raise CheckpointError("; ".join(problems) + "; use an older checkpoint")


def check_tensors(folder: Path, index: Index, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The checkpoint is one of this very model."""
    fix = "it is a checkpoint of another model: give the model.* settings that it was trained with"
    for name, shape in shapes.items():
        if name not in index:
            raise CheckpointError(f"{folder} has no tensor {name} {list(shape)}, which this model has; {fix}")
        if index[name].shape != tuple(shape):
            raise CheckpointError(
                f"{folder}: {name} has shape {list(index[name].shape)} there and {list(shape)} in this model; {fix}"
            )
    unknown = sorted(set(index) - set(shapes))
    if unknown:
        raise CheckpointError(f"{folder} has {len(unknown)} tensor(s) unknown to this model, {unknown[0]} first; {fix}")
