"""Sources in folders of torch distributed checkpoints (DCP), as FSDP and the TPU release write them.

Weights are found under "model" or at the top level, their moving average under "ema", AdamW's moments under "optimizer"
by the names of parameters (torch.distributed.checkpoint.state_dict). Moments that are numbered instead cannot be told
apart, and are not taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor

from rae_scale.convert.dcp_metadata import ChunkedTensor, Item, Metadata, Way, read_metadata
from rae_scale.convert.file_bytes import FileBytes
from rae_scale.convert.recognise import naming_of
from rae_scale.convert.records import check_all
from rae_scale.convert.source import Facts, Form, Naming
from rae_scale.convert.stored import StoredTensor
from rae_scale.convert.torch_source import EMA_KEYS, WEIGHT_KEYS
from rae_scale.convert.torch_zip import TorchFile
from rae_scale.engines.base import Kind
from rae_scale.engines.shards import MOMENTS
from rae_scale.infer.published import CONFIG_JSON
from rae_scale.parallel.boxes import Box
from rae_scale.state.format import CheckpointError, read_json

FLAT_STATE = re.compile(r"state\.(.+)\.(\w+)")
"""An entry of an optimizer whose state dict was saved flattened."""
STEP = "step"


class DCPSource:
    """`Source`: a folder with .metadata and *.distcp files."""

    def __init__(self, folder: Path, foreign: Mapping[str, Any]) -> None:
        self.what = f"DCP checkpoint {folder}"
        self.metadata = read_metadata(folder)
        self.tensors, steps = sorted_out(self.metadata)
        if "weight" not in self.tensors:
            held = sorted({".".join(map(str, way[:2])) for way in self.metadata.tensors})[:5]
            raise CheckpointError(
                f"{self.what} has no weights at the top level or under {', '.join(WEIGHT_KEYS)}, but {', '.join(held)}"
            )
        self.forms: dict[Kind, dict[str, Form]] = {
            kind: {name: Form(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            for kind, tensors in self.tensors.items()
        }
        self.opened: dict[Item, StoredTensor] = {}
        self.naming: Naming = naming_of(foreign, self.tensors["weight"], self.what)
        self.facts = Facts(
            foreign=foreign,
            step=self.step(),
            optimizer_step=max((int(self.assemble(tensor, Box((), ()))) for tensor in steps), default=None),
            weights="weight",
        )

    def step(self) -> int | None:
        """The value that a training loop saved as "step", as a number or as a tensor."""
        for way, item in self.metadata.objects.items():
            if way[-1] == STEP and len(way) <= 2:
                value = TorchFile(FileBytes(item.path, item.start, item.size)).content
                return value if isinstance(value, int) else None
        for way, tensor in self.metadata.tensors.items():
            if way[-1] == STEP and len(way) <= 2 and tensor.shape == ():
                return int(self.assemble(tensor, Box((), ())))
        return None

    def read(self, kind: Kind, name: str, box: Box) -> Tensor:
        return self.assemble(self.tensors[kind][name], box)

    def assemble(self, tensor: ChunkedTensor, box: Box) -> Tensor:
        out = torch.empty(box.shape, dtype=tensor.dtype)
        for chunk, item in tensor.chunks.items():
            common = chunk.intersect(box)
            if common is not None:
                stored = self.stored(item, chunk, tensor.dtype)
                out[common.relative_to(box).slices] = stored.read(common.relative_to(chunk))
        return out

    def stored(self, item: Item, chunk: Box, dtype: torch.dtype) -> StoredTensor:
        """A chunk's tensor: every chunk is a file of torch.save within the file."""
        if item not in self.opened:
            content = TorchFile(FileBytes(item.path, item.start, item.size)).content
            if not isinstance(content, StoredTensor) or content.shape != chunk.shape or content.dtype != dtype:
                raise CheckpointError(
                    f"{item.path}: at byte {item.start} should be a tensor {list(chunk.shape)} of {dtype}; the file "
                    "and .metadata are of two checkpoints, fetch all of one into an empty folder"
                )
            self.opened[item] = content
        return self.opened[item]

    def check(self) -> None:
        """Every chunk against the checksum that torch wrote.

        Raises:
            CheckpointError: names the file.
        """
        check_all(
            self.stored(item, chunk, tensor.dtype).storage.record
            for tensors in self.tensors.values()
            for tensor in tensors.values()
            for chunk, item in tensor.chunks.items()
        )

    def __enter__(self) -> DCPSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path in {item.path for item in self.opened}:
            FileBytes(path).close()


Sorted = dict[Kind, dict[str, ChunkedTensor]]


def sorted_out(metadata: Metadata) -> tuple[Sorted, list[ChunkedTensor]]:
    """The tensors by kind and name, and AdamW's counts of updates."""
    found: Sorted = {}
    steps = []
    nested = any(len(way) > 1 and way[-2] in WEIGHT_KEYS for way in metadata.tensors)
    for way, tensor in metadata.tensors.items():
        kind, name = meaning_of(way)
        if kind == STEP and tensor.shape == ():
            steps.append(tensor)
        elif kind in ("ema", *MOMENTS) or (kind == "weight" and len(way) > nested):
            found.setdefault(cast(Kind, kind), {})[name] = tensor
    for moment in MOMENTS:
        if all(name.isdigit() for name in found.get(moment, {})):
            found.pop(moment, None)
    return found, steps


def meaning_of(way: Way) -> tuple[str | None, str]:
    """Kind and name of the value at the end of a way. The kind may be "step"; None: it is nothing of the model."""
    last = str(way[-1])
    if last == STEP and len(way) <= 2:
        return None, last
    if len(way) > 2 and way[-3] == "state" and last in (STEP, *MOMENTS):
        return last, str(way[-2])
    flat = FLAT_STATE.fullmatch(last)
    if len(way) > 1 and flat is not None and flat[2] in (STEP, *MOMENTS):
        return flat[2], flat[1]
    if len(way) == 1 or way[-2] in WEIGHT_KEYS:
        return "weight", last
    return ("ema" if way[-2] in EMA_KEYS else None), last


def open_dcp(folder: Path) -> DCPSource:
    config = folder / CONFIG_JSON
    return DCPSource(folder, read_json(config) if config.is_file() else {})
