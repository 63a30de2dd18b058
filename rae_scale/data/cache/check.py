"""Is a file the shard that the index describes?"""

from __future__ import annotations

import hashlib
import os
from io import FileIO
from typing import Any

import numpy as np
import xxhash

from rae_scale.data.mds_format import UINT32
from rae_scale.data.mds_index import Shard

CHUNK_BYTES = 2**20


class DamagedShard(Exception):
    """A shard is missing, or is not what the index says."""


def new_hash(algorithm: str) -> Any:
    return getattr(xxhash, algorithm)() if algorithm.startswith("xxh") else hashlib.new(algorithm)


def check_shard(file: FileIO, shard: Shard, *, check_hash: bool) -> None:
    """Raises DamagedShard. Reading and hashing take 22 ms per 128 MB from memory (xxh3); else it is the disk's time."""
    size = os.fstat(file.fileno()).st_size
    if size != shard.bytes:
        raise DamagedShard(f"{size} bytes where the index says {shard.bytes}")
    if check_hash and shard.format.hash is not None:
        check_digest(hash_of(file, shard.format.hash), shard)
    check_offsets(file, shard)


def hash_of(file: FileIO, algorithm: str) -> str:
    digest = new_hash(algorithm)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    position = 0
    while count := os.preadv(file.fileno(), [buffer], position):
        digest.update(buffer[:count])
        position += count
    return digest.hexdigest()


def check_digest(found: str, shard: Shard) -> None:
    if found != shard.digest:
        raise DamagedShard(f"{shard.format.hash} {found} where the index says {shard.digest}")


def check_offsets(file: FileIO, shard: Shard) -> None:
    """Number of samples, then where each begins and the last ends."""
    table = np.frombuffer(os.pread(file.fileno(), UINT32.size * (shard.samples + 2), 0), dtype="<u4")
    header, offsets = table[:1], table[1:]
    if len(offsets) != shard.samples + 1 or header[0] != shard.samples or offsets[-1] != shard.bytes:
        raise DamagedShard(f"its header does not describe {shard.samples} samples in {shard.bytes} bytes")
    if offsets[0] < table.nbytes or np.any(offsets[1:] < offsets[:-1]):
        raise DamagedShard("the offsets of its samples are out of order")
