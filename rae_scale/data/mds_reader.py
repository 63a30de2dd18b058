"""Random access to the samples of an MDS folder, without mosaicml-streaming (its import takes 5 seconds).

Reading a sample is one lookup and two `pread` calls. The folder is checked when it is opened, so that a missing or cut
shard is known before the first step and not hours later.
"""

from __future__ import annotations

import json
import os
import struct
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash

from rae_scale.data.mds_format import INDEX_NAME, UINT32, Column, columns_of, decode_sample
from rae_scale.data.record import BadSample, Sample

MAX_OPEN_FILES = 64


@dataclass(frozen=True)
class Shard:
    path: Path
    samples: int
    bytes: int
    columns: tuple[Column, ...]


class MDSReader(Sequence[Sample]):
    """The samples of a folder of MDS shards, by index.

    Raises ValueError, naming the file and the fix, when the index or a shard is missing, cut or of another kind.
    Reading an index raises BadSample when the bytes of that sample are corrupt. Can be pickled (to worker processes);
    not to be shared between threads.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        data = read_index(self.folder / INDEX_NAME)
        self.fingerprint = xxhash.xxh3_128_hexdigest(data)
        self.shards = parse_index(data, self.folder)
        for shard in self.shards:
            check_shard(shard)
        self._ends = list(accumulate(shard.samples for shard in self.shards))
        self._files: OrderedDict[int, FileIO] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[int, int]:
        """(shard number, number within the shard) of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.folder}, which has {len(self)}")
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number] - self.shards[number].samples)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        number, row = self.locate(index)
        shard = self.shards[number]
        descriptor = self._open(number).fileno()
        name = f"{shard.path.name}:{row}"
        try:
            begin, end = struct.unpack("<2I", os.pread(descriptor, 2 * UINT32.size, UINT32.size * (1 + row)))
        except struct.error:
            raise BadSample("corrupt row", f"{name}: the shard was cut after it was opened") from None
        if not begin <= end <= shard.bytes:
            raise BadSample("corrupt row", f"{name}: offsets {begin} to {end} in a shard of {shard.bytes} bytes")
        return decode_sample(os.pread(descriptor, end - begin, begin), shard.columns, name)

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _open(self, number: int) -> FileIO:
        if number not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[number] = FileIO(self.shards[number].path)
        self._files.move_to_end(number)
        return self._files[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}


def read_index(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file; give the folder of shards that `rae-scale data build` wrote") from None


def parse_index(data: bytes, folder: Path) -> list[Shard]:
    path = folder / INDEX_NAME
    try:
        entries = json.loads(data)["shards"]
        return [parse_shard(entry, folder) for entry in entries]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a complete MDS index ({error!r}); build the folder again") from None


def parse_shard(entry: dict[str, Any], folder: Path) -> Shard:
    info = entry["raw_data"]
    path = folder / str(info["basename"])
    if (entry["version"], entry["format"]) != (2, "mds"):
        raise ValueError(f"{path}: format {entry['format']!r} version {entry['version']}; only MDS version 2 is read")
    if entry["compression"] is not None:
        raise ValueError(f"{path}: compressed with {entry['compression']!r}; write the shards without compression")
    if path.parent != folder:
        raise ValueError(f"{folder / INDEX_NAME}: shard name {info['basename']!r} leaves the folder; build it again")
    try:
        columns = columns_of(entry)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Shard(path, int(entry["samples"]), int(info["bytes"]), columns)


def check_shard(shard: Shard) -> None:
    """Compare size, sample count and offset table of a shard file with its index entry."""
    fix = "copy it again, or build the folder again"
    try:
        with FileIO(shard.path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.bytes:
                raise ValueError(f"{shard.path}: {size} bytes where the index says {shard.bytes}; {fix}")
            count = os.pread(file.fileno(), UINT32.size, 0)
            last = os.pread(file.fileno(), UINT32.size, UINT32.size * (shard.samples + 1))
    except FileNotFoundError:
        raise ValueError(f"{shard.path}: missing shard, listed in {INDEX_NAME}; {fix}") from None
    if (count, last) != (UINT32.pack(shard.samples), UINT32.pack(shard.bytes)):
        raise ValueError(f"{shard.path}: its header does not describe {shard.samples} samples; {fix}")
