"""Opens what a command is pointed at."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from threading import Event

from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.read_options import ReadOptions
from rae_scale.data.remote import MissingFile, is_remote, open_store, with_retries

# A few samples of many shards: hashing all of them would take as long as `verify`.
LOOK = ReadOptions(check_hashes=False)
# Shards of a remote data set that a look fetches, each some 128 MB.
REMOTE_SHARDS = 16


def is_shards(path: str | Path) -> bool:
    """Whether `path` is to be opened as a folder of shards: a folder or a URL. Else it is an input file."""
    return is_remote(str(path)) or Path(path).is_dir()


@lru_cache(maxsize=1)
def opened(path: str, options: ReadOptions = LOOK) -> MDSReader:
    """One reader per process: its index is not sent along with every task."""
    return MDSReader(path, options)


def shards_to_open(path: str | Path) -> int | None:
    """How many shards a look may open; None for any number."""
    return REMOTE_SHARDS if is_remote(str(path)) else None


class SmallFiles:
    """The files beside the shards of a data set, wherever it is. Raises FetchError when it cannot be reached."""

    def __init__(self, path: str | Path, options: ReadOptions = LOOK) -> None:
        self.store = open_store(str(path), options.fetch_timeout_s)
        self.options = options

    def read(self, name: str) -> bytes | None:
        """None when there is none."""

        def fetch() -> bytes:
            with self.store.open(name, Event()) as body:
                return b"".join(body.chunks)

        try:
            return with_retries(fetch, self.options.fetch_attempts, f"{self.store.source}/{name}", Event())
        except MissingFile:
            return None
