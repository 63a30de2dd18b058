"""A safetensors writer that holds one tensor at a time.

The library's own wants all tensors in memory at once, which for optimizer state is twice what fits beside the model.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from rae_scale.state.format import sync

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor of known form whose contents are fetched when their turn comes: whole or in consecutive parts, which
    together are its elements in row-major order."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[], Iterable[Tensor]]


def write_tensors(path: Path, tensors: Sequence[TensorToWrite], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file, force it to disk, and return its xxh3-128. Holds one fetched part at a time."""
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
            written = 0
            for part in tensor.fetch():
                flat = part.detach().to("cpu", tensor.dtype).reshape(-1).contiguous()
                data = flat.view(torch.uint8).numpy().data
                digest.update(data)
                file.write(data)
                written += flat.numel()
                # Before the next part is fetched: two would be in memory otherwise.
                del part, flat, data
            assert written == torch.Size(tensor.shape).numel(), f"{tensor.key}: {written} elements were fetched"
        file.flush()
        sync(file.fileno())
    return digest.hexdigest()
