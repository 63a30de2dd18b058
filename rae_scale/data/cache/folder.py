"""The folder in which the processes of a machine keep shards, and its limit.

    <root>/lock                      held while room is made
    <root>/<source>/lock             one byte per shard: held while that shard is fetched
    <root>/<source>/000012.mds       a shard as it is read
    <root>/<source>/000012.x9y.part  the same, on its way
    <root>/<source>/index            see index_file.py; not counted

A shard that is evicted while a process has it open stays readable there until it is closed, as files do. So eviction
needs to ask nobody, and whoever fetched a shard can read it, however small the limit.
"""

from __future__ import annotations

import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from rae_scale.data.cache.locks import LockBusy, lock

GB = 10**9
SHARD, PART = ".mds", ".part"
ROOM_POLL_S = 0.05
ROOT_LOCK_S = 60.0  # it is held for as long as it takes to list the folder


class NoRoom(Exception):
    """The limit is taken up by shards that are being fetched."""


@dataclass(frozen=True)
class Kept:
    path: Path
    size: int
    used_ns: int


class CacheFolder:
    def __init__(self, root: Path | None, limit_gb: float) -> None:
        self.root = root or private_folder()
        self.limit = int(limit_gb * GB)

    def used(self) -> int:
        """Bytes of all shards in it."""
        return sum(file.size for file in self._files()) if self.root.is_dir() else 0

    def folder(self, source: str) -> Path:
        path = self.root / source
        path.mkdir(parents=True, exist_ok=True)
        return path

    def make_part(self, path: Path, size: int, timeout_s: float) -> FileIO:
        """An empty file beside `path` that counts as `size` bytes from now on. Raises NoRoom after `timeout_s`.

        Shards are evicted as needed, those first that were not opened for longest. Hold the lock of that shard: then
        any other part of it was left by a process that is gone.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{path.stem}.*{PART}"):
            left.unlink(missing_ok=True)
        deadline = time.monotonic() + timeout_s
        while True:
            with lock(self.root / "lock", 0, ROOT_LOCK_S):
                if self._make_room(size):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    descriptor, name = tempfile.mkstemp(PART, f"{path.stem}.", path.parent)
                    os.close(descriptor)
                    part = FileIO(name, "r+")
                    part.truncate(size)
                    return part
            if time.monotonic() >= deadline:
                raise NoRoom
            time.sleep(ROOM_POLL_S)

    def _make_room(self, size: int) -> bool:
        kept = sorted(self._files(), key=lambda file: file.used_ns)
        excess = sum(file.size for file in kept) + size - self.limit
        for file in kept:
            if excess <= 0:
                break
            if file.path.suffix == SHARD or is_abandoned(file.path):
                file.path.unlink(missing_ok=True)
                excess -= file.size
        return excess <= 0

    def _files(self) -> Iterator[Kept]:
        for path in self.root.glob("*/*"):
            if path.suffix in (SHARD, PART):
                with suppress(FileNotFoundError):  # another process, or somebody, was faster
                    state = path.lstat()
                    yield Kept(path, state.st_size, state.st_atime_ns)


@contextmanager
def failures_named(path: Path, limit_gb: float) -> Iterator[None]:
    """Of the file system that the cache is on."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror or error}; the folder of the cache has to be writable and needs room for "
            f"data.cache_gb={limit_gb:g}: see data.cache_dir"
        ) from None


def is_abandoned(part: Path) -> bool:
    """Whether the process that was writing it is gone: it held the lock of that shard."""
    try:
        with lock(part.parent / "lock", int(part.name.partition(".")[0]), 0.0):
            return True
    except LockBusy:
        return False


def touch(file: FileIO) -> None:
    """Mark a shard as used. The time of last access is set by hand: file systems are often mounted without it."""
    state = os.fstat(file.fileno())
    os.utime(file.fileno(), ns=(time.time_ns(), state.st_mtime_ns))


def private_folder() -> Path:
    """The same for all processes of a user. Others could put shards there, or read them, if it were theirs or open."""
    path = Path(tempfile.gettempdir()) / f"rae-scale-shards-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    state = path.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise ValueError(
            f"{path}: belongs to somebody else or is open to others; set data.cache_dir to a folder of yours"
        )
    return path
