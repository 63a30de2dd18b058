"""The same checkpoint in another number of files: for other file systems, or fewer of them to move."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from rae_scale.engines.base import Kind
from rae_scale.parallel.boxes import Box, even_split, whole
from rae_scale.state.format import STATE, CheckpointError, read_json, sync_folder, temporary_folder
from rae_scale.state.index import Index, key, read_index
from rae_scale.state.load import check_files
from rae_scale.state.read import PieceReader
from rae_scale.state.save import describe
from rae_scale.state.tensorfile import TensorToWrite, write_tensors

Share = list[tuple[Kind, str, Box]]
"""What one file is to hold."""


def reshard_checkpoint(source: str | Path, destination: str | Path, files: int) -> Path:
    """Write the checkpoint `source` as the new folder `destination`, with its tensors in `files` files of nearly equal
    size, and return that folder. Loading it gives every bit that loading `source` gives.

    Little is in memory at a time (`read.CHUNK_BYTES`), however large the tensors are. Until it is complete and on disk,
    the new folder has a hidden name.

    Raises:
        ValueError: `files` is below 1.
        CheckpointError: the source is damaged or no checkpoint, or `destination` exists.
    """
    if files < 1:
        raise ValueError(f"files={files}: a checkpoint is written into 1 file or more")
    source, final = Path(source), Path(destination)
    if final.exists():
        raise CheckpointError(f"{final} exists; reshard into a new folder, or remove that one first")
    check_files(source)
    index, state = read_index(source), read_json(source / STATE)
    temporary = temporary_folder(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with PieceReader(source, index) as reader:
        manifest = {
            part_file(number): write_tensors(
                temporary / part_file(number), [to_write(reader, *item) for item in share], metadata={}
            )
            for number, share in enumerate(plan(index, files))
        }
    describe(temporary, {name: entry.shape for name, entry in index.items()}, manifest, state)
    os.rename(temporary, final)
    sync_folder(final.parent)
    return final


def part_file(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def to_write(reader: PieceReader, kind: Kind, name: str, box: Box) -> TensorToWrite:
    return TensorToWrite(key(kind, name, box), box.shape, torch.float32, lambda: reader.chunks(kind, name, box))


def plan(index: Index, files: int) -> list[Share]:
    """What each file holds: an equal part of each tensor's rows. A tensor of fewer rows than files goes whole into the
    file with the fewest elements so far."""
    shares: list[Share] = [[] for _ in range(files)]
    sizes = [0] * files
    for name, entry in index.items():
        for kind, pieces in entry.pieces.items():
            if not pieces:  # a tensor without elements
                continue
            everything = whole(entry.shape)
            rows = entry.shape[0] if entry.shape else 1
            if rows < files:
                number = sizes.index(min(sizes))
                boxes = [(number, everything)]
            else:
                ranges = (even_split(0, rows, number, files) for number in range(files))
                boxes = [
                    (number, Box((first, *everything.start[1:]), (last, *everything.stop[1:])))
                    for number, (first, last) in enumerate(ranges)
                ]
            for number, box in boxes:
                shares[number].append((kind, name, box))
                sizes[number] += box.numel
    return shares
