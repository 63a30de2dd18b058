"""safetensors files that may be anyone's: headers read strictly, boxes read from the mapped files.

The library keeps the last of two tensors of one name, and leaves it to its caller whether a file is the one that the
folder's index means.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rae_scale.convert.source import Form
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state.format import CheckpointError
from rae_scale.state.tensorfile import DTYPE_NAMES

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
LARGEST_HEADER = 100 << 20  # what the library accepts


@dataclass(frozen=True)
class Header:
    path: Path
    forms: Mapping[str, Form]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """What a safetensors file says it holds.

    Raises:
        CheckpointError: it is cut off or has too much, holds a name twice, tensors overlap, leave gaps or are of
            another size than their shape, or a dtype is none of float32, bfloat16 and float16.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else LARGEST_HEADER
        if length > min(size - 8, LARGEST_HEADER):
            raise damaged(path, f"its {size} bytes do not hold a safetensors header")
        text = file.read(length)
    try:
        content = json.loads(text.decode(), object_pairs_hook=lambda pairs: without_repeats(path, pairs))
        metadata = content.pop("__metadata__", {})
        entries = {name: (DTYPES.get(e["dtype"]), tuple(e["shape"]), *e["data_offsets"]) for name, e in content.items()}
        unknown = [f"{name} ({e['dtype']})" for name, e in content.items() if e["dtype"] not in DTYPES]
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path, f"its header is none of safetensors ({type(error).__name__}: {error})") from None
    if unknown:
        raise CheckpointError(f"{path} has {', '.join(unknown[:5])}: weights are of dtype {', '.join(DTYPES)} here")
    check_offsets(path, entries, size - 8 - length)
    forms = {name: Form(shape, dtype) for name, (dtype, shape, _, _) in entries.items() if dtype is not None}
    return Header(path, forms, metadata)


def damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {why}; fetch or write it again")


def without_repeats(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise damaged(path, f"it has {', '.join(twice)} twice, and readers differ in which they take")
    return found


def check_offsets(path: Path, entries: Mapping[str, tuple[Any, ...]], size: int) -> None:
    """The tensors lie one behind the other and fill the `size` bytes behind the header."""
    for name, (_, shape, start, stop) in entries.items():
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop)):
            raise damaged(path, f"{name} has shape {list(shape)} at bytes {start} to {stop}")
    end = 0
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != end:
            what = "overlaps the tensor before it" if start < end else f"leaves {start - end} bytes before it unused"
            raise damaged(path, f"{name} at bytes {start} to {stop} {what}")
        wanted = math.prod(shape) * dtype.itemsize
        if stop - start != wanted:
            raise damaged(path, f"{name} {list(shape)} needs {wanted} bytes and has {stop - start}")
        if stop > size:
            raise damaged(path, f"{name} ends at byte {stop} and the file's data at {size}: the file is cut off")
        end = stop
    if end != size:
        raise damaged(path, f"{size - end} bytes behind its last tensor belong to none")


class TensorFiles:
    """Tensors by name over several files, each in one."""

    def __init__(self, headers: Iterable[Header]) -> None:
        """Raises CheckpointError if two files have a tensor of one name."""
        self.forms: dict[str, Form] = {}
        self.paths: dict[str, Path] = {}
        for header in headers:
            for name, form in header.forms.items():
                if name in self.paths:
                    raise CheckpointError(
                        f"{name} is in {self.paths[name]} and in {header.path}; remove the file that does not belong "
                        "to this checkpoint"
                    )
                self.forms[name], self.paths[name] = form, header.path
        self.open: dict[Path, Any] = {}

    def read(self, name: str, box: Box) -> Tensor:
        path = self.paths[name]
        if path not in self.open:
            self.open[path] = safe_open(path, framework="pt")
        file = self.open[path]
        if box == whole(self.forms[name].shape):
            tensor: Tensor = file.get_tensor(name)
            return tensor
        # A view of the mapped file, made to outlive it.
        part: Tensor = file.get_slice(name)[box.slices]
        return part.clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        self.open.clear()


def one_step(headers: Iterable[Header]) -> Mapping[str, str]:
    """The metadata of files of one checkpoint.

    Raises:
        CheckpointError: they are of different steps or kinds of weights.
    """
    headers = list(headers)
    first = headers[0]
    for key in ("step", "kind"):
        for header in headers:
            if header.metadata.get(key) != first.metadata.get(key):
                raise CheckpointError(
                    f"{first.path} has {key} {first.metadata.get(key)} and {header.path} has "
                    f"{header.metadata.get(key)}: files of two checkpoints are mixed here; fetch all of one again"
                )
    return first.metadata


def step_of(metadata: Mapping[str, str]) -> int | None:
    step = metadata.get("step", "")
    return int(step) if step.isdigit() else None


BASES = ("model", "diffusion_pytorch_model")
INDEX_SUFFIX = ".safetensors.index.json"


def headers_of(folder: Path) -> list[Header]:
    """The headers of a folder's weight files, compared with its index if it has one.

    Raises:
        CheckpointError: the folder's index and its files do not agree, or a file is damaged.
    """
    for base in BASES:
        index, single = folder / f"{base}{INDEX_SUFFIX}", folder / f"{base}.safetensors"
        if index.is_file() and single.is_file():
            raise CheckpointError(f"{folder} has {index.name} and {single.name}; remove the one that is out of date")
        if index.is_file():
            return indexed(folder, index)
        if single.is_file():
            return [read_header(single)]
    found = ", ".join(sorted(path.name for path in folder.glob("*.safetensors*"))[:5])
    known = ", ".join(f"{base}.safetensors, {base}{INDEX_SUFFIX}" for base in BASES)
    raise CheckpointError(f"{folder} has {found}, but none of {known}; give the file itself")


def indexed(folder: Path, index: Path) -> list[Header]:
    weight_map = read_weight_map(index)
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} lists {', '.join(missing)}, which {folder} does not have; fetch what is there")
    stray = sorted({path.name for path in folder.glob("*.safetensors")} - set(files))
    if stray:
        raise CheckpointError(f"{folder / stray[0]} is not in {index.name}; remove it if it is of another checkpoint")
    headers = [read_header(folder / name) for name in files]
    held = {name: header.path.name for header in headers for name in header.forms}
    differing = sorted(name for name in held.keys() | weight_map.keys() if held.get(name) != weight_map.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{index} has {name} in {weight_map.get(name)}, and it is in {held.get(name)} ({len(differing)} tensors "
            "differ); fetch the index and the files of one checkpoint again"
        )
    return headers


def read_weight_map(index: Path) -> dict[str, str]:
    try:
        text = index.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=lambda pairs: without_repeats(index, pairs))
        weight_map = content["weight_map"]
        good = bool(weight_map) and all(Path(file).name == file for file in weight_map.values())
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(index, f"it is no index of weights ({type(error).__name__}: {error})") from None
    if not good:
        raise damaged(index, "its weight_map is empty or names files outside the folder")
    return dict(weight_map)
