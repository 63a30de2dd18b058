"""A safetensors writer that holds one tensor at a time.

The library's own wants all tensors in memory at once, which for optimizer state is twice what fits beside the model.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from rae_scale.state.format import sync

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor of known form whose contents are fetched when their turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[], Tensor]


def write_tensors(path: Path, tensors: Sequence[TensorToWrite], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file, force it to disk, and return its xxh3-128."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        start, end = end, end + torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        header[tensor.key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = xxhash.xxh3_128()
    with path.open("wb") as file:
        for block in (struct.pack("<Q", len(encoded)), encoded):
            digest.update(block)
            file.write(block)
        for tensor in tensors:
            flat = tensor.fetch().detach().to("cpu", tensor.dtype).reshape(-1).contiguous()
            data = flat.view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.flush()
        sync(file.fileno())
    return digest.hexdigest()
