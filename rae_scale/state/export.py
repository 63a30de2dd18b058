"""Weights alone, to share or to start from: a folder with model.safetensors, config.yaml and manifest.json."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
import yaml

from rae_scale.parallel.boxes import whole
from rae_scale.state.format import (
    CONFIG,
    EXPORTED,
    MANIFEST,
    STATE,
    CheckpointError,
    read_json,
    sync_folder,
    temporary_folder,
    write_json,
)
from rae_scale.state.index import read_index
from rae_scale.state.load import check_files
from rae_scale.state.read import PieceReader
from rae_scale.state.tensorfile import TensorToWrite, write_tensors
from rae_scale.state.weights import WeightKind, has_ema, source_kind


def export_weights(
    checkpoint: str | Path,
    out_dir: str | Path,
    kind: WeightKind | None = None,
    prefixes: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write one kind of weights of a checkpoint into the new folder `out_dir` and return it. Little is in memory at
    a time, however large the tensors are.

    prefixes: only the names that begin with one of them; names stay whole. `read_weights` reads the result.

    Raises:
        CheckpointError: the checkpoint is damaged or lacks what was asked for, or `out_dir` exists.
    """
    source, out = Path(checkpoint), Path(out_dir)
    if out.exists():
        raise CheckpointError(f"{out} exists; export into a new folder, or remove that one first")
    check_files(source)
    index, state = read_index(source), read_json(source / STATE)
    names = [name for name in index if prefixes is None or name.startswith(tuple(prefixes))]
    if not names:
        raise CheckpointError(f"{source}: no tensor's name begins with any of {list(prefixes or ())}")
    temporary = temporary_folder(out)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with PieceReader(source, index) as reader:

        def to_write(name: str) -> TensorToWrite:
            found = source_kind(source, index, name, kind)
            shape = index[name].shape
            return TensorToWrite(name, shape, dtype, lambda: reader.chunks(found, name, whole(shape)))

        taken = kind or ("ema" if has_ema(index) else "weight")
        metadata = {"format": "pt", "kind": taken, "step": str(state["step"])}
        hashes = {EXPORTED: write_tensors(temporary / EXPORTED, [to_write(name) for name in names], metadata)}
    config = yaml.safe_dump(state.get("config", {}), sort_keys=False).encode()
    (temporary / CONFIG).write_bytes(config)
    hashes[CONFIG] = xxhash.xxh3_128_hexdigest(config)
    write_json(temporary / MANIFEST, hashes)
    sync_folder(temporary)
    os.rename(temporary, out)
    return out
