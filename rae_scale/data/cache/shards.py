"""The shard files of a source, checked: where they lie, or in the cache of this machine."""

from __future__ import annotations

import errno
import logging
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from io import FileIO
from pathlib import Path
from threading import Event
from typing import Any

from rae_scale.data.cache.check import DamagedShard, check_digest, check_offsets, check_shard, new_hash
from rae_scale.data.cache.checked import CheckedFiles
from rae_scale.data.cache.decompress import decompressed
from rae_scale.data.cache.folder import GB, SHARD, CacheFolder, NoRoom, failures_named, touch
from rae_scale.data.cache.locks import LockBusy, lock
from rae_scale.data.mds_index import MDSIndex, Shard
from rae_scale.data.read_options import ReadOptions
from rae_scale.data.remote import FetchError, MissingFile, Store, with_retries
from rae_scale.data.remote.retry import MAX_DELAY_S
from rae_scale.data.remote.transfer import MIN_BYTES_PER_S

logger = logging.getLogger(__name__)


class ShardFiles(ABC):
    """Opens shards that were checked: each file once by a process and those that it starts, and again after a change.

    Can be pickled. Its methods may be called from several threads.
    """

    def __init__(self, store: Store, index: MDSIndex, options: ReadOptions) -> None:
        self.store = store
        self.index = index
        self.options = options
        self.closing = Event()
        self._checked = CheckedFiles(len(index))
        self._damaged: dict[int, str] = {}

    def open(self, number: int, *, wait: bool = True) -> FileIO:
        """
        wait: for another process that fetches it or takes up the room for it; without, LockBusy or NoRoom.

        Raises DamagedShard, every time for a shard for which it did once; FetchError, and ValueError for a cache that
        cannot be used.
        """
        if number in self._damaged:
            raise DamagedShard(self._damaged[number])
        try:
            return self._open(number, wait)
        except DamagedShard as problem:
            self._damaged[number] = str(problem)
            raise

    @abstractmethod
    def _open(self, number: int, wait: bool) -> FileIO: ...

    def _open_checked(self, path: Path, number: int) -> FileIO:
        """Raises DamagedShard and FileNotFoundError."""
        file = FileIO(path)
        try:
            if not self._checked.knows(number, file):
                check_shard(file, self.index[number], check_hash=self.options.check_hashes)
                self._checked.add(number, file)
            return file
        except BaseException:
            file.close()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "closing": None, "_damaged": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.closing = Event()


class LocalShards(ShardFiles):
    """Where they lie. Nothing is ever written or removed there."""

    def __init__(self, folder: Path, store: Store, index: MDSIndex, options: ReadOptions) -> None:
        super().__init__(store, index, options)
        self.folder = folder

    def _open(self, number: int, wait: bool) -> FileIO:
        path = self.folder / self.index.names[number]
        try:
            return self._open_checked(path, number)
        except (FileNotFoundError, NotADirectoryError):
            raise DamagedShard("the file is missing") from None
        except OSError as error:
            if error.errno == errno.EIO:  # of this place on the disk; anything else is not of this shard
                raise DamagedShard("the disk fails to read it") from None
            raise FetchError(f"{path}: cannot be read ({error.strerror})") from None


class CachedShards(ShardFiles):
    """In the cache, to which they are fetched (and decompressed) by the first process that needs them."""

    def __init__(self, store: Store, index: MDSIndex, options: ReadOptions, key: str) -> None:
        super().__init__(store, index, options)
        self.cache = CacheFolder(options.cache_dir, options.cache_gb)
        self.key = key
        largest = int(index.bytes.max(initial=0))
        if largest > self.cache.limit:
            raise ValueError(
                f"data.cache_gb={options.cache_gb:g} is less than one shard: {store.source} has one of {largest} "
                f"bytes; set data.cache_gb to at least {largest / GB:.3g}, better to what a node reads in some minutes"
            )

    def _open(self, number: int, wait: bool) -> FileIO:
        with failures_named(self.cache.root, self.options.cache_gb):
            path = self.cache.folder(self.key) / f"{number:06}{SHARD}"
            with suppress(FileNotFoundError, DamagedShard):
                return self._open_kept(path, number)
            return self._open_locked(path, number, wait)

    def _open_locked(self, path: Path, number: int, wait: bool) -> FileIO:
        patience = self._patience(number) if wait else 0.0
        try:
            with lock(path.parent / "lock", number, patience):
                with suppress(FileNotFoundError):
                    try:
                        return self._open_kept(path, number)
                    except DamagedShard as problem:
                        logger.warning("%s in the cache: %s; fetching it again", path, problem)
                        path.unlink(missing_ok=True)
                return self._fetch(path, number, patience)
        except (LockBusy, NoRoom) as problem:
            if not wait:
                raise
            what = "for its room" if isinstance(problem, NoRoom) else "for another process to fetch it"
            raise ValueError(
                f"{path}: waited {patience:.0f} s {what}; look for processes that hang on this machine, or raise "
                f"data.cache_gb={self.options.cache_gb:g}"
            ) from None

    def _open_kept(self, path: Path, number: int) -> FileIO:
        file = self._open_checked(path, number)
        touch(file)
        return file

    def _fetch(self, path: Path, number: int, patience: float) -> FileIO:
        """Fetch into a file of another name and give it its own when it was found good.

        No fsync: what a crash of the machine leaves is checked before it is used, like everything here.
        """
        shard = self.index[number]
        part = self.cache.make_part(path, shard.bytes, patience)
        try:
            self._fill(part, shard)
            self._checked.add(number, part)
            # Removed by hand, perhaps; what is open can be read all the same.
            with suppress(FileNotFoundError):
                os.replace(str(part.name), path)
            return part
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(str(part.name))
            part.close()
            raise

    def _fill(self, part: FileIO, shard: Shard) -> None:
        """A shard that arrives damaged is fetched once more: it may have been damaged on its way."""
        key = f"{self.store.source}/{shard.name}"
        for last in (False, True):
            try:
                return with_retries(lambda: self._transfer(part, shard), self.options.fetch_attempts, key, self.closing)
            except MissingFile as problem:
                raise DamagedShard(str(problem)) from None
            except DamagedShard as problem:
                if last or not self.store.remote:
                    raise
                logger.warning("%s: %s; fetching it once more", key, problem)

    def _transfer(self, part: FileIO, shard: Shard) -> None:
        part.seek(0)
        part.truncate(0)
        part.truncate(shard.bytes)
        digest = new_hash(shard.format.hash) if shard.format.hash else None
        received = written = 0

        def arriving(chunks: Any) -> Any:
            nonlocal received
            for chunk in chunks:
                received += len(chunk)
                if received > shard.file_bytes:
                    raise DamagedShard(f"more than the {shard.file_bytes} bytes that the index says")
                yield chunk

        with self.store.open(shard.name, self.closing) as body:
            if body.length is not None and body.length != shard.file_bytes:
                raise DamagedShard(f"{body.length} bytes where the index says {shard.file_bytes}")
            pieces = arriving(body.chunks)
            if shard.format.compression is not None:
                pieces = decompressed(pieces, shard.format.compression, shard.bytes)
            for piece in pieces:
                write_all(part, piece)
                written += len(piece)
                if digest is not None:
                    digest.update(piece)
        if written != shard.bytes:
            raise DamagedShard(f"{written} bytes where the index says {shard.bytes}")
        if digest is not None:
            check_digest(digest.hexdigest(), shard)
        check_offsets(part, shard)

    def _patience(self, number: int) -> float:
        """Seconds within which whoever fetches it has it or has given up."""
        options = self.options
        once = 2 * options.fetch_timeout_s + MAX_DELAY_S + int(self.index.file_bytes[number]) / MIN_BYTES_PER_S
        return options.fetch_attempts * once


def write_all(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
