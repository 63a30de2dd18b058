"""One file of a latent cache: the latents of a run of consecutive samples of one source.

A safetensors file, so that anything can read it:

    latents  [images, T, C]  BF16 or I8
    scales   [images, T]     F32, int8 only
    row      [samples]       I32: where a sample's latents are; -1 it has no image, -2 its image cannot be used
    hash     [images]        U64: xxh3-64 of the bytes of its latents, then of its scales
    __metadata__             "bad": JSON {number within the unit: [reason, detail]} of the -2

What is not latents or scales, the head, is read when the file is opened; its hash stands in the index of the cache. So
whatever is read is checked, and reading one sample reads no other.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from rae_scale.data.latents.numbers import Latents
from rae_scale.data.mds_writer import write_durably
from rae_scale.data.record import BadSample

NO_IMAGE, BAD_IMAGE = -1, -2
LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 1 << 26
HEAD = ("row", "hash")
TORCH_OF = {"BF16": torch.bfloat16, "I8": torch.int8, "F32": torch.float32}


@dataclass(frozen=True)
class UnitEntry:
    """What the index says of a unit. head: xxh3-128 of everything in it but latents and scales."""

    samples: int
    images: int
    bad: int
    bytes: int
    head: str


def write_unit(path: Path, latents: Latents, rows: Sequence[int], bad: Mapping[int, tuple[str, str]]) -> UnitEntry:
    """Write a unit: complete under its name, or not at all.

    latents: of its images [images, T, C], on the CPU. rows, bad: per sample of the unit, as in the file.
    """
    tensors = {"latents": latents.values.contiguous(), "row": torch.tensor(rows, dtype=torch.int32)}
    if latents.scales is not None:
        tensors["scales"] = latents.scales.contiguous()
    hashes = [row_hash(*row_bytes(latents, row)) for row in range(len(latents.values))]
    tensors["hash"] = torch.from_numpy(np.array(hashes, dtype=np.uint64))
    data = save(tensors, {"bad": json.dumps({str(number): list(reason) for number, reason in sorted(bad.items())})})
    write_durably(path, [data])
    return entry_of(path)


def row_bytes(latents: Latents, row: int) -> list[memoryview]:
    kept = [latents.values[row], *([] if latents.scales is None else [latents.scales[row]])]
    return [tensor.contiguous().view(-1).view(torch.uint8).numpy().data for tensor in kept]


def row_hash(*parts: bytearray | memoryview) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def entry_of(path: Path) -> UnitEntry:
    """What the index is to say of the file at `path`, from its head alone.

    Raises:
        ValueError: it is no unit, or cut. OSError: it cannot be read.
    """
    with Unit(path) as unit:
        return UnitEntry(len(unit.rows), len(unit.hashes), len(unit.bad), unit.bytes, unit.head)


class Unit:
    """An open unit. Raises ValueError, naming the file, if its head cannot be understood."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = FileIO(path)
        try:
            self._open()
        except (ValueError, KeyError, TypeError, struct.error) as error:
            self._file.close()
            raise ValueError(f"{path}: not a whole file of latents ({error}); remove it, and it is made anew") from None

    def _open(self) -> None:
        self.bytes = os.fstat(self._file.fileno()).st_size
        (length,) = LENGTH.unpack(self._read(0, LENGTH.size))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        header = self._read(LENGTH.size, length)
        entries: dict[str, Any] = json.loads(header)
        start = LENGTH.size + length
        self._places = {
            name: (entry["dtype"], entry["shape"], start + entry["data_offsets"][0])
            for name, entry in entries.items()
            if name != "__metadata__"
        }
        end = start + max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        if end != self.bytes:
            raise ValueError(f"{self.bytes} bytes where its header says {end}")
        rows, hashes = (self._read(self._places[name][2], entries[name]["data_offsets"]) for name in HEAD)
        self.rows = np.frombuffer(rows, dtype="<i4")
        self.hashes = np.frombuffer(hashes, dtype="<u8")
        self.bad = {int(number): tuple(reason) for number, reason in json.loads(entries["__metadata__"]["bad"]).items()}
        self.head = xxhash.xxh3_128_hexdigest(header + rows + hashes)

    def __getitem__(self, number: int) -> Latents | None:
        """Latents [T, C] of sample `number` of the unit; None if it has no image.

        Raises:
            BadSample: its image could not be used when the cache was made, or its latents are no longer what was
                written.
        """
        row = int(self.rows[number])
        if row == NO_IMAGE:
            return None
        if row == BAD_IMAGE:
            raise BadSample(*self.bad[number])
        names = [name for name in ("latents", "scales") if name in self._places]
        try:
            parts = [self._read_row(name, row) for name in names]
        except ValueError as error:
            raise BadSample("corrupt latents", f"{self.path.name}:{number}: {error}") from None
        if row_hash(*parts) != int(self.hashes[row]):
            raise BadSample(
                "corrupt latents", f"{self.path.name}:{number}: its hash is another; remove {self.path} and start again"
            )
        tensors = [self._tensor(name, part) for name, part in zip(names, parts, strict=True)]
        return Latents(tensors[0], tensors[1] if len(tensors) > 1 else None)

    def _read_row(self, name: str, row: int) -> bytearray:
        dtype, shape, start = self._places[name]
        size = torch.Size(shape[1:]).numel() * TORCH_OF[dtype].itemsize
        return self._read(start + row * size, size)

    def _tensor(self, name: str, data: bytearray) -> Tensor:
        dtype, shape, _ = self._places[name]
        return torch.frombuffer(data, dtype=TORCH_OF[dtype]).view(shape[1:])

    def _read(self, start: int, size: int | Sequence[int]) -> bytearray:
        """size: of what is read, or where it begins and ends."""
        data = bytearray(size if isinstance(size, int) else size[1] - size[0])
        if os.preadv(self._file.fileno(), [data], start) != len(data):
            raise ValueError(f"cut: there are no {len(data)} bytes at {start}")
        return data

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Unit:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
