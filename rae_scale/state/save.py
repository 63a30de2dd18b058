"""Writing a checkpoint: hidden until it is complete and on disk, then renamed, then pointed to."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import rae_scale
from rae_scale.engines import Engine, Piece
from rae_scale.parallel import Mesh
from rae_scale.state.agreement import agree, on_main
from rae_scale.state.format import (
    INDEX,
    LATEST,
    MANIFEST,
    STATE,
    CheckpointError,
    build_index,
    index_to_json,
    key,
    rank_file,
    replaced_folder,
    rows_of,
    step_folder,
    sync,
    sync_folder,
    temporary_folder,
    write_json,
)
from rae_scale.state.tensorfile import TensorToWrite, write_tensors


def save_checkpoint(
    run_dir: str | Path, step: int, engine: Engine, mesh: Mesh, extra: Mapping[str, Any], keep_last: int
) -> Path:
    """Save the engine's state as <run_dir>/checkpoints/step-<step> and return that path. Collective.

    Every rank writes what it owns, so `run_dir` is on a file system that all nodes share. Interrupted at any point, the
    checkpoints that were there stay valid and pointed to. A checkpoint of the same step is replaced.

    extra: JSON-able; comes back from `load_checkpoint`. keep_last: of the checkpoints, only so many stay.

    Raises:
        CheckpointError: on all ranks if any could not write (disk full, folder not shared).
    """
    root = Path(run_dir) / "checkpoints"
    final = root / step_folder(step)
    temporary = temporary_folder(final)
    try:
        on_main(mesh, lambda: make_temporary(temporary))
        hashes = agree(mesh, lambda: write_rank(temporary / rank_file(mesh.rank), engine))
        state = {**extra, **describe_state(step, engine, mesh)}
        on_main(mesh, lambda: describe(temporary, engine.shapes, hashes, state))
        on_main(mesh, lambda: publish(temporary, final))
        on_main(mesh, lambda: prune(final, keep_last))
    except CheckpointError as error:
        if mesh.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"step {step} could not be saved in {root}: {error}") from None
    return final


def describe_state(step: int, engine: Engine, mesh: Mesh) -> dict[str, Any]:
    return {
        "step": step,
        "optimizer_step": engine.optimizer_step,
        "layout": {axis: getattr(mesh, axis) for axis in ("dp_replicate", "dp_shard", "sp", "tp")},
        "versions": {
            "rae_scale": rae_scale.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def make_temporary(temporary: Path) -> None:
    """A fresh folder to write into; what earlier interrupted saves have left is removed."""
    for stale in temporary.parent.glob(".step-*.tmp"):
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)


def write_rank(path: Path, engine: Engine) -> str:
    """Write this rank's pieces and return the file's hash."""
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{path.parent} was made by the main rank but is not visible here; put run.dir on a file system that all "
            "nodes share"
        )
    return write_tensors(path, [to_write(piece) for piece in engine.pieces()], metadata={})


def to_write(piece: Piece) -> TensorToWrite:
    length = piece.stop - piece.start
    return TensorToWrite(key(piece.kind, piece.name, piece.start), (length,), torch.float32, lambda: piece.tensor)


def describe(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], rank_hashes: list[str], state: dict[str, Any]
) -> None:
    """Write the index, the state, and last the manifest, which makes the folder complete."""
    manifest = {rank_file(rank): digest for rank, digest in enumerate(rank_hashes)}
    # From the files: every rank telling the main one what it wrote would be megabytes per rank.
    index = build_index(shapes, (row for name in manifest for row in rows_of(folder / name)))
    index_hash = write_json(folder / INDEX, index_to_json(index))
    state_hash = write_json(folder / STATE, state)
    write_json(folder / MANIFEST, {**manifest, INDEX: index_hash, STATE: state_hash})
    sync_folder(folder)


def publish(temporary: Path, final: Path) -> None:
    """Give the complete folder its name, then point to it."""
    root, replaced = final.parent, replaced_folder(final)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_folder(root)
    pointer = root / f".{LATEST}.tmp"
    with pointer.open("w", encoding="utf-8") as file:
        file.write(final.name)
        file.flush()
        sync(file.fileno())
    os.replace(pointer, root / LATEST)
    sync_folder(root)
    for superseded in root.glob(".step-*.old"):
        shutil.rmtree(superseded)


def prune(newest: Path, keep_last: int) -> None:
    """Remove all but `keep_last` checkpoints: `newest` and those of the highest steps stay."""
    others = sorted(path for path in newest.parent.glob("step-*") if path != newest)
    for path in others[: max(0, len(others) - (keep_last - 1))]:
        # First what makes it complete, so that half of it is never taken for a checkpoint.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
