"""Writes samples as MDS shards that mosaicml-streaming reads.

Ours instead of mosaicml's MDSWriter, which takes 5 seconds to import, needs torchvision, writes shards in place without
fsync, and whose `exist_ok` deletes the folder that it is given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash

from rae_scale.data.mds_format import HASH, INDEX_NAME, UINT32, WRITTEN, row_parts
from rae_scale.data.record import Sample

DEFAULT_SHARD_BYTES = 128 * 2**20
MAX_SHARD_BYTES = 2**32 - 1  # offsets are uint32
PIECE_BYTES = 2**20


class MDSWriter:
    """Writes `shard.00000.mds`, ... and on `finish()` the index, without which the folder is not a dataset.

    A shard is closed before it would exceed `shard_bytes`; a single larger sample gets a shard of its own. All shards
    are on the disk before the index appears.

    A thread writes one shard while the next one is filled: memory holds up to two. buffers: that memory, for whoever
    has several writers one after the other.
    """

    def __init__(
        self, folder: str | Path, shard_bytes: int = DEFAULT_SHARD_BYTES, buffers: tuple[Rows, Rows] | None = None
    ) -> None:
        check_shard_bytes(shard_bytes)
        self.folder = Path(folder)
        self.shard_bytes = shard_bytes
        self.shards: list[dict[str, Any]] = []
        self._config = {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": [HASH],
            "size_limit": shard_bytes,
            "column_names": list(WRITTEN),
            "column_encodings": list(WRITTEN.values()),
            "column_sizes": [None] * len(WRITTEN),
        }
        self._header = json.dumps(self._config, sort_keys=True).encode("ascii")
        self._rows, self._spare = buffers or (Rows(), Rows())
        self._rows.clear()
        self._thread = ThreadPoolExecutor(1, "mds-writer")
        self._writing: Future[None] | None = None

    def write(self, sample: Sample) -> None:
        """Add a sample. Raises ValueError when it does not fit into a shard at all."""
        parts = row_parts(sample)
        size = sum(map(len, parts))
        if self._start(1) + size > MAX_SHARD_BYTES:
            raise ValueError(f"sample {sample.key!r} has {size} bytes; an MDS shard holds {MAX_SHARD_BYTES}")
        rows = self._rows
        if rows.lengths and self._start(len(rows.lengths) + 1) + rows.size + size > self.shard_bytes:
            self._flush()
        self._rows.add(parts, size)

    def close(self) -> list[dict[str, Any]]:
        """Write the last shard; returns the entries of all of them in an index."""
        if self._rows.lengths:
            self._flush()
        self._wait()
        self._thread.shutdown()
        return self.shards

    def finish(self) -> None:
        """Write the last shard and the index."""
        self.close()
        index = {"version": 2, "shards": self.shards}
        write_durably(self.folder / INDEX_NAME, [json.dumps(index, sort_keys=True).encode("ascii")])

    def _start(self, count: int) -> int:
        """Where the first of so many rows begins."""
        return UINT32.size * (count + 2) + len(self._header)

    def _flush(self) -> None:
        self._wait()
        self._writing = self._thread.submit(self._write_shard, self._rows)
        self._rows, self._spare = self._spare, self._rows
        self._rows.clear()

    def _wait(self) -> None:
        """Raises what writing the last shard did."""
        if self._writing is not None:
            self._writing.result()

    def _write_shard(self, rows: Rows) -> None:
        count = len(rows.lengths)
        offsets = accumulate(rows.lengths, initial=self._start(count))
        table = b"".join(UINT32.pack(number) for number in (count, *offsets))
        name = f"shard.{len(self.shards):05}.mds"
        with rows.data.getbuffer() as data:
            size, digest = write_synced(self.folder / name, [table, self._header, *pieces(data[: rows.size])])
        raw_data = {"basename": name, "bytes": size, "hashes": {HASH: digest}}
        self.shards.append({"samples": count, "raw_data": raw_data, "zip_data": None, **self._config})


class Rows:
    """The rows of a shard, one after the other; then those of another one, since memory that is new to the process
    costs more than what is copied into it."""

    def __init__(self) -> None:
        self.data = BytesIO()
        self.size = 0
        self.lengths: list[int] = []

    def add(self, parts: Iterable[bytes], size: int) -> None:
        """A row of `size` bytes."""
        self.data.writelines(parts)
        self.size += size
        self.lengths.append(size)

    def clear(self) -> None:
        self.data.seek(0)
        self.size = 0
        self.lengths = []


def pieces(data: memoryview) -> list[memoryview]:
    """For a kernel with large folios, one write of a whole shard takes five times as long as many of a mebibyte."""
    return [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]


def check_shard_bytes(shard_bytes: int) -> None:
    if not 0 < shard_bytes <= MAX_SHARD_BYTES:
        raise ValueError(f"shard_bytes={shard_bytes}: MDS shards have 1 to {MAX_SHARD_BYTES} bytes")


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file so that after a crash it is either absent or complete. Returns its size and its hash."""
    temporary = path.with_name(f".{path.name}.tmp")
    written = write_synced(temporary, chunks)
    os.replace(temporary, path)
    sync_folder(path.parent)
    return written


def write_synced(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file that is on the disk on return. Returns its size and its hash."""
    digest = xxhash.xxh3_128()
    size = 0
    with open(path, "wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
