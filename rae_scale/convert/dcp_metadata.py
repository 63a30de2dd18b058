"""`.metadata` of a torch distributed checkpoint: which tensors there are and where their chunks lie.

The file is a pickle of dataclasses of torch.distributed.checkpoint (torch 2.15). They are read as plain values: no
class is built. Nested state dicts appear flattened, with the way to each value kept beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rae_scale.convert.torch_zip import DTYPES
from rae_scale.convert.unpickle import Global, Inert, inert, read_pickle
from rae_scale.parallel.boxes import Box
from rae_scale.state.format import CheckpointError
from rae_scale.state.index import coverage_fault

METADATA = ".metadata"
CLASSES = "torch.distributed.checkpoint.metadata "
CALLS = {
    **dict.fromkeys(DTYPES),
    "torch Size": tuple,
    "torch.serialization _get_layout": str,
    f"{CLASSES}_MEM_FORMAT_ENCODING": int,
    **inert(
        *(
            CLASSES + name
            for name in (
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
            )
        ),
        "torch.distributed.checkpoint.filesystem _StorageInfo",
        "pathlib PosixPath",
        "pathlib._local PosixPath",
    ),
}

Way = tuple[str | int, ...]
"""The keys that lead to a value in a nested state dict: ("optimizer", "state", "dit.x_embed.bias", "exp_avg")."""


@dataclass(frozen=True)
class Item:
    """A value that torch.save wrote at bytes `start` to `start + size` of a file."""

    path: Path
    start: int
    size: int


@dataclass(frozen=True)
class ChunkedTensor:
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Mapping[Box, Item]


@dataclass(frozen=True)
class Metadata:
    """tensors, objects: by the way to them."""

    tensors: Mapping[Way, ChunkedTensor]
    objects: Mapping[Way, Item]


def read_metadata(folder: Path) -> Metadata:
    """What a checkpoint folder holds.

    Raises:
        CheckpointError: the metadata is damaged, names what it need not, lists chunks that do not make up a tensor, or
            files that are missing or cut off.
    """
    path = folder / METADATA
    content = read_pickle(path.read_bytes(), CALLS, str(path))
    try:
        return metadata_of(folder, content.state)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not built as torch 2.15 builds it ({type(error).__name__}: {error}); load the "
            "checkpoint with the torch that wrote it, and save it anew"
        ) from None


def metadata_of(folder: Path, state: Mapping[str, Any]) -> Metadata:
    items = {
        (index.state["fqn"], index.state.get("offset")): item_of(folder, index.state["fqn"], info.state)
        for index, info in state["storage_data"].items()
    }
    check_files(items)
    ways: Mapping[str, Way] = state.get("planner_data") or {}
    tensors, objects = {}, {}
    for name, form in state["state_dict_metadata"].items():
        way = ways.get(name, (name,))
        if kind_of(form) == "TensorStorageMetadata":
            tensors[way] = tensor_of(folder, name, form.state, items)
        elif (name, None) in items:
            objects[way] = items[name, None]
    return Metadata(tensors, objects)


def kind_of(value: Inert) -> str:
    return value.name.removeprefix(CLASSES)


def item_of(folder: Path, name: str, info: Mapping[str, Any]) -> Item:
    file = info["relative_path"]
    if Path(file).name != file:
        raise CheckpointError(f"{folder / METADATA}: {name} lies in {file!r}, outside the folder; fetch it again")
    if info.get("transform_descriptors"):
        raise CheckpointError(
            f"{folder / METADATA}: {name} is stored through {info['transform_descriptors']}, which is not undone here; "
            "save it without storage extensions"
        )
    return Item(folder / file, info["offset"], info["length"])


def check_files(items: Mapping[Any, Item]) -> None:
    """Every file is there and long enough."""
    ends: dict[Path, int] = {}
    for item in items.values():
        ends[item.path] = max(ends.get(item.path, 0), item.start + item.size)
    for path, end in sorted(ends.items()):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; every rank writes its own, so fetch those of all nodes")
        if path.stat().st_size < end:
            raise CheckpointError(f"{path} is cut off: it has {path.stat().st_size} of {end} bytes; fetch it again")


def tensor_of(folder: Path, name: str, form: Mapping[str, Any], items: Mapping[Any, Item]) -> ChunkedTensor:
    shape, dtype = form["size"], form["properties"].state[0]
    if not isinstance(dtype, Global) or dtype.name not in DTYPES:
        raise CheckpointError(f"{folder / METADATA}: {name} is of dtype {dtype}, which is not read here")
    chunks = {}
    for chunk in form["chunks"]:
        start, sizes = chunk.state["offsets"], chunk.state["sizes"]
        box = Box(start, tuple(first + length for first, length in zip(start, sizes, strict=True)))
        if box.numel:  # a rank may have had nothing of it
            chunks[box] = items[name, start]
    fault = coverage_fault(shape, list(chunks))
    if fault:
        raise CheckpointError(f"{folder / METADATA}: {name} {list(shape)}: {fault}; some ranks' parts are not listed")
    return ChunkedTensor(shape, DTYPES[dtype.name], chunks)
