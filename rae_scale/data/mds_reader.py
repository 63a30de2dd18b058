"""Random access to the samples of an MDS folder, local or remote, without mosaicml-streaming (its import takes 5
seconds).

Opening reads the index only. A shard is checked when it is first opened: size, offsets and hash; a remote or compressed
one is then in the cache of the machine. Reading a sample of an open shard is one lookup and two `pread` calls.
"""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from rae_scale.data.cache import DamagedShard, Prefetcher, fingerprint_of, read_index, shard_files
from rae_scale.data.cache.shards import CachedShards
from rae_scale.data.mds_format import INDEX_NAME, UINT32, decode_sample
from rae_scale.data.mds_index import parse_index
from rae_scale.data.read_options import ReadOptions
from rae_scale.data.record import BadSample, Sample
from rae_scale.data.remote import open_store, with_retries

MAX_OPEN_FILES = 64
FIX = "copy it again, or build the folder again"


class BadShard(BadSample):
    """A sample whose shard is damaged or missing."""


class MDSReader(Sequence[Sample]):
    """The samples of a folder of MDS shards, by index.

    path: a folder, or a URL of one: `s3://bucket/folder`, `gs://...`, `https://...`, `file:///...`.

    Attributes:
        source: `path` as it may be shown: without passwords and tokens.
        name: its last part.
        sizes: int64 `[shards]`, samples of each shard.
        shard_bytes: int64 `[shards]`, bytes of each shard as it is read.
        fingerprint: hash of the index, which holds the hash of every shard.

    Raises ValueError, naming the file and the fix, when the index is missing, cut or of another kind, when a source
    cannot be reached, and for a damaged shard if `options.bad_shards` is stop. Reading an index raises BadSample when
    that sample is corrupt and BadShard (one of them) when its shard is. Can be pickled to spawned processes. Not to be
    shared between threads.
    """

    def __init__(self, path: str | Path, options: ReadOptions | None = None) -> None:
        self.options = options or ReadOptions()
        self._store = open_store(str(path), self.options.fetch_timeout_s)
        self.source = self._store.source
        self.name = self._store.name
        data = read_index(self._store, self.options)
        self.fingerprint = fingerprint_of(data)
        self.mds_index = parse_index(data, f"{self.source}/{INDEX_NAME}")
        self.sizes = self.mds_index.samples
        self.shard_bytes = self.mds_index.bytes
        self._ends = np.cumsum(self.sizes)
        self._shards = shard_files(self._store, self.mds_index, self.fingerprint, self.options)
        self._files: OrderedDict[int, FileIO] = OrderedDict()
        self._bad: dict[int, str] = {}
        self._prefetcher: Prefetcher | None = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[int, int]:
        """(shard number, number within the shard) of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.source}, which has {len(self)}")
        number = int(self._ends.searchsorted(index, side="right"))
        return number, index - int(self._ends[number] - self.sizes[number])

    def shard_name(self, number: int) -> str:
        """For messages: the file of a shard, relative to the source."""
        return self.mds_index.names[number]

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        number, row = self.locate(index)
        descriptor = self._open(number).fileno()
        name = f"{self.shard_name(number)}:{row}"
        size = int(self.shard_bytes[number])
        try:
            begin, end = struct.unpack("<2I", os.pread(descriptor, 2 * UINT32.size, UINT32.size * (1 + row)))
            if not begin <= end <= size:
                raise BadSample("corrupt row", f"{name}: offsets {begin} to {end} in a shard of {size} bytes")
            data = os.pread(descriptor, end - begin, begin)
        except struct.error:
            raise BadSample("corrupt row", f"{name}: the shard was cut after it was opened") from None
        except OSError as error:
            raise BadSample("corrupt row", f"{name}: {error.strerror}") from None
        return decode_sample(data, self.mds_index.formats[self.mds_index.format_of[number]].columns, name)

    @property
    def fetches(self) -> bool:
        """Whether shards come through the cache of the machine, so that `prefetch` saves time."""
        return isinstance(self._shards, CachedShards)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Have these shards fetched and checked in the background, in this order. Returns at once.

        What fails is left to the read that needs it. Numbers beyond what may wait are dropped: ask again later.
        """
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._shards)
        self._prefetcher.add(shards)

    def probe(self, number: int) -> None:
        """See that a shard can be reached and begins as the index says, without fetching it. Raises ValueError."""
        shard = self.mds_index[number]
        where = f"{self.source}/{shard.name}"

        def look() -> None:
            with self._store.open(shard.name, Event()) as body:
                begin = next(body.chunks, b"")
                if body.length not in (None, shard.file_bytes):
                    raise ValueError(f"{where}: {body.length} bytes where the index says {shard.file_bytes}; {FIX}")
                if shard.format.compression is None and begin[: UINT32.size] != UINT32.pack(shard.samples):
                    raise ValueError(f"{where}: does not begin as the index says; {FIX}")

        with_retries(look, self.options.fetch_attempts, where, Event())

    def close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        while self._files:
            self._files.popitem()[1].close()

    def _open(self, number: int) -> FileIO:
        if number in self._bad:
            raise BadShard("bad shard", self._bad[number])
        if number not in self._files:
            try:
                file = self._shards.open(number)
            except DamagedShard as problem:
                raise self._refusal(number, problem) from None
            self._close_some()
            self._files[number] = file
        self._files.move_to_end(number)
        return self._files[number]

    def _close_some(self) -> None:
        """Make room for one more, and let go of shards that the cache has evicted: open, they still fill the disk."""
        for number in [number for number, file in self._files.items() if os.fstat(file.fileno()).st_nlink == 0]:
            self._files.pop(number).close()
        while len(self._files) >= MAX_OPEN_FILES:
            self._files.popitem(last=False)[1].close()

    def _refusal(self, number: int, problem: DamagedShard) -> ValueError:
        where = f"{self.source}/{self.shard_name(number)}: {problem}"
        if fingerprint_of(read_index(self._store, self.options)) != self.fingerprint:
            return ValueError(
                f"{where}. {INDEX_NAME} there has changed since this process read it: the data were replaced under the "
                "run. Start it again, from a new folder if it should see the new data"
            )
        if self.options.bad_shards == "stop":
            return ValueError(
                f"{where}. Copy or build it again, or set data.bad_shards=quarantine to do without its "
                f"{self.sizes[number]} samples"
            )
        self._bad[number] = where
        return BadShard("bad shard", where)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_bad": {}, "_prefetcher": None}


def source_fingerprint(path: str | Path, options: ReadOptions | None = None) -> str:
    """What MDSReader(path).fingerprint is, without parsing the index."""
    options = options or ReadOptions()
    return fingerprint_of(read_index(open_store(str(path), options.fetch_timeout_s), options))
