"""What a checkpoint looks like on disk.

    <run>/checkpoints/
        latest                          text: the name of the newest complete checkpoint
        step-00001000/
            rank-00000.safetensors ...  the pieces that each rank owned, float32, keys "kind/name/start"
            index.json                  tensor -> shape, and per kind the pieces' ranges and files
            state.json                  step, optimizer step, mesh, versions, and what the caller added
            manifest.json               file -> xxh3-128

Ranges count elements of the row-major logical tensor, so nothing in here depends on how the writer had split it. There
is no pickle. A folder is complete if it has its manifest, which is written last; until then it has a hidden name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from safetensors import safe_open

from rae_scale.engines.base import Kind

FORMAT = "rae-scale checkpoint"
VERSION = 1
INDEX, STATE, MANIFEST, LATEST = "index.json", "state.json", "manifest.json", "latest"
EXPORTED, CONFIG = "model.safetensors", "config.yaml"
READ_BYTES = 1 << 24


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or cannot be loaded into this model. Says which file or tensor and why."""


@dataclass(frozen=True)
class Range:
    """Elements `start` to `stop` of a tensor are in `file`, under `key(kind, name, start)`."""

    start: int
    stop: int
    file: str


@dataclass
class TensorEntry:
    shape: tuple[int, ...]
    ranges: dict[Kind, list[Range]] = field(default_factory=dict)
    """Sorted, without gaps or overlaps. A frozen tensor has "weight" only."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


Index = dict[str, TensorEntry]

IndexRow = tuple[Kind, str, int, int, str]
"""kind, name, start, stop, file"""


def key(kind: Kind, name: str, start: int) -> str:
    return f"{kind}/{name}/{start}"


def rows_of(path: Path) -> Iterator[IndexRow]:
    """What a rank has written, from the header of its file alone."""
    with safe_open(path, framework="pt") as file:
        for text in file.keys():  # noqa: SIM118 (not a mapping)
            kind, name, start = text.split("/")
            (length,) = file.get_slice(text).get_shape()
            yield kind, name, int(start), int(start) + length, path.name


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def temporary_folder(final: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return final.parent / f".{final.name}.tmp"


def replaced_folder(final: Path) -> Path:
    """Where a checkpoint waits while another takes its name."""
    return final.parent / f".{final.name}.old"


def build_index(shapes: Mapping[str, tuple[int, ...]], rows: Iterable[IndexRow]) -> Index:
    """The index of all ranks' pieces, in the order of `shapes`.

    Raises:
        CheckpointError: some element of a tensor is in no piece, or in two.
    """
    index = {name: TensorEntry(shape, {"weight": []}) for name, shape in shapes.items()}
    for kind, name, start, stop, file in rows:
        index[name].ranges.setdefault(kind, []).append(Range(start, stop, file))
    for name, entry in index.items():
        for kind, ranges in entry.ranges.items():
            ranges.sort(key=lambda item: item.start)
            edges = [0, *(item.stop for item in ranges)]
            if [item.start for item in ranges] != edges[:-1] or edges[-1] != entry.numel:
                raise CheckpointError(
                    f"{kind} of {name} {list(entry.shape)}: the ranks' pieces do not cover its {entry.numel} elements "
                    "exactly once"
                )
    return index


def index_to_json(index: Index) -> dict[str, Any]:
    tensors = {
        name: {
            "shape": list(entry.shape),
            "pieces": {kind: [[r.start, r.stop, r.file] for r in ranges] for kind, ranges in entry.ranges.items()},
        }
        for name, entry in index.items()
    }
    return {"format": FORMAT, "version": VERSION, "tensors": tensors}


def read_index(folder: Path) -> Index:
    content = read_json(folder / INDEX)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise CheckpointError(
            f"{folder / INDEX}: format {content.get('format')!r} version {content.get('version')!r}; this release "
            f"reads {FORMAT!r} version {VERSION}"
        )
    return {
        name: TensorEntry(
            tuple(entry["shape"]), {kind: [Range(*r) for r in ranges] for kind, ranges in entry["pieces"].items()}
        )
        for name, entry in content["tensors"].items()
    }


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: {path.parent} is not a complete checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): the file is damaged") from None


def write_json(path: Path, content: Mapping[str, Any]) -> str:
    """Write, force to disk, and return the hash of what was written."""
    data = json.dumps(content, indent=1).encode()
    with path.open("wb") as file:
        file.write(data)
        sync(file.fileno())
    return xxhash.xxh3_128_hexdigest(data)


def sync(descriptor: int) -> None:
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Force the folder's list of names to disk: a rename lasts only then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def damaged_files(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with every `parts`-th file of the manifest, from number `part` on: one line per file.

    safetensors reads a flipped byte without an error, hence the hashes.
    """
    problems = []
    for name, expected in sorted(read_json(folder / MANIFEST).items())[part::parts]:
        if not (folder / name).is_file():
            problems.append(f"{folder / name} is missing")
        elif file_hash(folder / name) != expected:
            problems.append(f"{folder / name} is damaged: its contents are not what was written")
    return problems
