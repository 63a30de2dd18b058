"""Writing a checkpoint: hidden until it is complete and on disk, then renamed, then pointed to."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rae_scale
from rae_scale.engines import Engine, Piece
from rae_scale.parallel import Mesh
from rae_scale.state.agreement import agree, on_main
from rae_scale.state.format import (
    CHECKPOINTS,
    INDEX,
    MANIFEST,
    STATE,
    CheckpointError,
    point_to,
    rank_file,
    remove_checkpoint,
    replaced_folder,
    step_folder,
    step_folders,
    step_of,
    sync_folder,
    temporary_folder,
    write_json,
)
from rae_scale.state.index import build_index, index_to_json, key, rows_of
from rae_scale.state.tensorfile import TensorToWrite, write_tensors


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay on disk: the newest `last`, and those at multiples of `every` steps (0: none)."""

    last: int
    every: int = 0


@dataclass(frozen=True)
class Description:
    """All of a checkpoint but its tensors; it stays true while training goes on.

    shapes: of every parameter, by name. state: what goes into state.json.
    """

    final: Path
    shapes: Mapping[str, tuple[int, ...]]
    state: dict[str, Any]
    retention: Retention


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    engine: Engine,
    mesh: Mesh,
    extra: Mapping[str, Any],
    keep_last: int,
    keep_every: int = 0,
) -> Path:
    """Save the engine's state as <run_dir>/checkpoints/step-<step> and return that path. Collective.

    Every rank writes what it owns, so `run_dir` is on a file system that all nodes share. Interrupted at any point, the
    checkpoints that were there stay valid and pointed to. A checkpoint of the same step is replaced. Beside the
    engine's own memory, one tensor is held at a time.

    extra: JSON-able; comes back from `load_checkpoint`. keep_last, keep_every: see `Retention`.

    Raises:
        CheckpointError: on all ranks if any could not write (disk full, folder not shared).
    """
    description = describe_engine(run_dir, step, engine, mesh, extra, Retention(keep_last, keep_every))
    tensors = [to_write(piece, lambda piece=piece: [piece.tensor]) for piece in engine.pieces()]  # type: ignore[misc]
    return write_checkpoint(description, tensors, mesh)


def describe_engine(
    run_dir: str | Path, step: int, engine: Engine, mesh: Mesh, extra: Mapping[str, Any], retention: Retention
) -> Description:
    state = {
        **extra,
        "step": step,
        "optimizer_step": engine.optimizer_step,
        "layout": {axis: getattr(mesh, axis) for axis in ("dp_replicate", "dp_shard", "sp", "tp")},
        "versions": {
            "rae_scale": rae_scale.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    return Description(Path(run_dir) / CHECKPOINTS / step_folder(step), engine.shapes, state, retention)


def to_write(piece: Piece, fetch: Callable[[], Iterable[Tensor]]) -> TensorToWrite:
    """A piece's place in the file. Holds on to its contents only if `fetch` does."""
    return TensorToWrite(key(piece.kind, piece.name, piece.box), piece.box.shape, torch.float32, fetch)


def write_checkpoint(what: Description, tensors: Sequence[TensorToWrite], mesh: Mesh) -> Path:
    """Write this rank's `tensors`, which with those of the other ranks are the checkpoint, and publish it. Collective.

    Raises:
        CheckpointError: as `save_checkpoint`.
    """
    temporary = temporary_folder(what.final)
    try:
        on_main(mesh, lambda: make_temporary(temporary))
        hashes = agree(mesh, lambda: write_rank(temporary / rank_file(mesh.rank), tensors))
        manifest = {rank_file(rank): digest for rank, digest in enumerate(hashes)}
        on_main(mesh, lambda: describe(temporary, what.shapes, manifest, what.state))
        on_main(mesh, lambda: publish(temporary, what.final))
        on_main(mesh, lambda: prune(what.final, what.retention))
    except CheckpointError as error:
        if mesh.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"step {what.state['step']} could not be saved in {what.final.parent}: {error}") from None
    return what.final


def make_temporary(temporary: Path) -> None:
    """A fresh folder to write into; what earlier interrupted saves have left is removed."""
    for stale in temporary.parent.glob(".step-*.tmp"):
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)


def write_rank(path: Path, tensors: Sequence[TensorToWrite]) -> str:
    """Write this rank's pieces and return the file's hash."""
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{path.parent} was made by the main rank but is not visible here; put run.dir on a file system that all "
            "nodes share"
        )
    return write_tensors(path, tensors, metadata={})


def describe(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], manifest: Mapping[str, str], state: Mapping[str, Any]
) -> None:
    """Write the index, the state, and last the manifest, which makes the folder complete.

    manifest: name -> hash of the tensor files.
    """
    # From the files: every rank telling the main one what it wrote would be megabytes per rank.
    index = build_index(shapes, (row for name in manifest for row in rows_of(folder / name)))
    # A line per number would make it several times as large.
    index_hash = write_json(folder / INDEX, index_to_json(index), indent=None)
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
    point_to(final)
    for superseded in root.glob(".step-*.old"):
        shutil.rmtree(superseded)


def prune(newest: Path, retention: Retention) -> None:
    """Remove the checkpoints that `retention` does not keep. `newest` counts as the newest whatever its step is."""
    others = [path for path in step_folders(newest.parent) if path != newest]
    for path in others[: max(0, len(others) - (retention.last - 1))]:
        if retention.every and (step_of(path) or 0) % retention.every == 0:
            continue
        remove_checkpoint(path)
