"""Which file holds which part of which tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rae_scale.engines.base import Kind
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state.format import FORMAT, INDEX, VERSION, CheckpointError, read_json


@dataclass(frozen=True)
class StoredBox:
    """The elements in `box` of a tensor are in `file`, under `key(kind, name, box)`."""

    box: Box
    file: str


@dataclass
class TensorEntry:
    shape: tuple[int, ...]
    pieces: dict[Kind, list[StoredBox]] = field(default_factory=dict)
    """In row-major order of their first elements, without gaps or overlaps. A frozen tensor has "weight" only."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


Index = dict[str, TensorEntry]

IndexRow = tuple[Kind, str, StoredBox]
"""kind, name of the tensor, what of it is where"""


def key(kind: Kind, name: str, box: Box) -> str:
    return f"{kind}/{name}/{','.join(map(str, box.start))}"


def rows_of(path: Path) -> Iterator[IndexRow]:
    """What a file holds, from its header alone."""
    with safe_open(path, framework="pt") as file:
        for text in file.keys():  # noqa: SIM118 (not a mapping)
            kind, name, corner = text.split("/")
            start = tuple(map(int, corner.split(","))) if corner else ()
            shape = file.get_slice(text).get_shape()
            stop = tuple(first + length for first, length in zip(start, shape, strict=True))
            yield kind, name, StoredBox(Box(start, stop), path.name)


def build_index(shapes: Mapping[str, tuple[int, ...]], rows: Iterable[IndexRow]) -> Index:
    """The index of all files' boxes, in the order of `shapes`.

    Raises:
        CheckpointError: some element of a tensor is in no box, or in two.
    """
    index = {name: TensorEntry(shape, {"weight": []}) for name, shape in shapes.items()}
    for kind, name, stored in rows:
        index[name].pieces.setdefault(kind, []).append(stored)
    for name, entry in index.items():
        for kind, pieces in entry.pieces.items():
            pieces.sort(key=lambda stored: stored.box.start)
            fault = coverage_fault(entry.shape, [stored.box for stored in pieces])
            if fault:
                raise CheckpointError(
                    f"{kind} of {name} {list(entry.shape)}: the pieces do not cover its {entry.numel} elements exactly "
                    f"once: {fault}"
                )
    return index


def coverage_fault(shape: tuple[int, ...], boxes: Sequence[Box]) -> str:
    """Why `boxes` do not cover each element of a tensor of `shape` exactly once; "" if they do."""
    everything = whole(shape)
    for box in boxes:
        if len(box.start) != len(shape) or box.intersect(everything) != box:
            return f"{describe(box)} is not a part of it"
    # Disjoint boxes inside a tensor that sum up to its size leave nothing out.
    pair = first_overlap(boxes)
    if pair is not None:
        return f"{describe(pair[0])} and {describe(pair[1])} overlap"
    found = sum(box.numel for box in boxes)
    return "" if found == everything.numel else f"{found} elements are there"


def first_overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None. Sweeps along the dimension in which the boxes begin most differently,
    so that only few lie side by side at any time."""
    if len(boxes) < 2:
        return None
    dimensions = range(len(boxes[0].start))
    if not dimensions:
        return boxes[0], boxes[1]
    dim = max(dimensions, key=lambda d: len({box.start[d] for box in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.start[dim]):
        active = [other for other in active if other.stop[dim] > box.start[dim]]
        for other in active:
            if other.intersect(box) is not None:
                return other, box
        active.append(box)
    return None


def describe(box: Box) -> str:
    """A box as one writes it in Python: [0:4, 2:3]."""
    return f"[{', '.join(f'{first}:{last}' for first, last in zip(box.start, box.stop, strict=True))}]"


def index_to_json(index: Index) -> dict[str, Any]:
    tensors = {
        name: {
            "shape": entry.shape,
            "pieces": {
                kind: [[stored.box.start, stored.box.stop, stored.file] for stored in pieces]
                for kind, pieces in entry.pieces.items()
            },
        }
        for name, entry in index.items()
    }
    return {"format": FORMAT, "version": VERSION, "tensors": tensors}


def read_index(folder: Path) -> Index:
    """The index of a checkpoint.

    Raises:
        CheckpointError: it is missing, no JSON, or of another version of the format.
    """
    content = read_json(folder / INDEX)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise CheckpointError(
            f"{folder / INDEX}: format {content.get('format')!r} version {content.get('version')!r}; this release "
            f"reads {FORMAT!r} version {VERSION}; use the release that wrote it"
        )
    index = {
        name: TensorEntry(
            tuple(entry["shape"]),
            {
                kind: [StoredBox(Box(tuple(start), tuple(stop)), file) for start, stop, file in pieces]
                for kind, pieces in entry["pieces"].items()
            },
        )
        for name, entry in content["tensors"].items()
    }
    files = {stored.file for entry in index.values() for pieces in entry.pieces.values() for stored in pieces}
    outside = sorted(file for file in files if Path(file).name != file)
    if outside:
        raise CheckpointError(f"{folder / INDEX} names {outside[0]!r}, outside the folder: no release has written that")
    return index
