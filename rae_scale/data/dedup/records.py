"""The file of fingerprints of one input file.

A header of 32 bytes (magic, version, number of records, their xxh3_128 hash), then the records, little endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash

from rae_scale.data.mds_writer import write_durably

RECORD = np.dtype(
    [
        ("content", "<u8", (2,)),  # xxh3_128 of what the sample is
        ("look", "<u8"),  # perceptual hash of the image
        ("position", "<u4"),  # which item of the input file it is
        ("has_look", "<u4"),  # 1 when `look` holds a hash
    ]
)
HEADER = struct.Struct("<4sIQ16s")
MAGIC = b"RAEF"
VERSION = 1


def write_fingerprints(path: str | Path, records: Iterable[bytes]) -> int:
    """Write records made by `fingerprint` so that after a crash the file is absent or complete. Returns their number.

    Positions must rise from record to record. 32 bytes per sample are held in memory until all are there.
    """
    data = b"".join(records)
    positions = np.frombuffer(data, RECORD)["position"]
    if np.any(positions[1:] <= positions[:-1]):
        raise ValueError(f"{path}: the positions of fingerprints must rise; write them in the order of the input")
    header = HEADER.pack(MAGIC, VERSION, len(positions), xxhash.xxh3_128_digest(data))
    write_durably(Path(path), (header, data))
    return len(positions)


def read_fingerprints(path: str | Path) -> np.ndarray:
    """The records of a file, as an array of `RECORD`. Raises ValueError for a damaged or foreign file."""
    data = Path(path).read_bytes()
    if len(data) < HEADER.size or data[:4] != MAGIC:
        raise ValueError(f"{path}: not a file of fingerprints; scan its input again")
    _, version, count, digest = HEADER.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"{path}: fingerprints of version {version}, this program reads {VERSION}; scan again")
    body = memoryview(data)[HEADER.size :]
    if len(body) != count * RECORD.itemsize or xxhash.xxh3_128_digest(body) != digest:
        raise ValueError(f"{path}: damaged, its content does not match its hash; remove it and scan its input again")
    return np.frombuffer(body, RECORD)


def count_fingerprints(path: str | Path) -> int:
    """How many records a file holds, from its size."""
    return max(0, Path(path).stat().st_size - HEADER.size) // RECORD.itemsize
