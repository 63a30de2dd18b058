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


def encode_header(forms: Iterable[tuple[str, tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with if tensors of these keys, shapes and dtypes follow in this order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for key, shape, dtype in forms:
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def write_tensors(path: Path, tensors: Sequence[TensorToWrite], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file, force it to disk, and return its xxh3-128. Holds one fetched part at a time."""
    header = encode_header(((tensor.key, tensor.shape, tensor.dtype) for tensor in tensors), metadata)
    digest = xxhash.xxh3_128(header)
    with path.open("wb") as file:
        file.write(header)
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
