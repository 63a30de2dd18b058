"""Where the files of a source are: a local folder, a web server, S3 or GCS. All are read the same way."""

from __future__ import annotations

import base64
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from io import FileIO
from pathlib import Path
from threading import Event, Lock
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from rae_scale.data.remote.errors import FetchError, MissingFile
from rae_scale.data.remote.transfer import CHUNK_BYTES, Body, Request, get
from rae_scale.data.remote.urls import below, bucket_and_prefix, redacted


class Store(ABC):
    """Files by name, below one place. Can be pickled; its clients are made anew in each process.

    source: the place, as it may be shown. remote: whether it can be away for a while.
    """

    remote = True

    def __init__(self, source: str) -> None:
        self.source = source

    @property
    def name(self) -> str:
        return self.source.rstrip("/").rpartition("/")[2]

    @abstractmethod
    def open(self, name: str, closing: Event, headers: dict[str, str] | None = None) -> AbstractContextManager[Body]:
        """Begin to read a file. Raises FetchError."""


class FolderStore(Store):
    remote = False

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder

    @property
    def name(self) -> str:
        return self.folder.name or self.folder.resolve().name

    @contextmanager
    def open(self, name: str, closing: Event, headers: dict[str, str] | None = None) -> Iterator[Body]:
        path = self.folder / name
        with failures_named(path):
            file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed below; what the caller raises is not ours)
        with file:
            yield Body(os.fstat(file.fileno()).st_size, "", False, file_chunks(file, path))


def file_chunks(file: FileIO, path: Path) -> Iterator[bytes]:
    while True:
        with failures_named(path):
            chunk = file.read(CHUNK_BYTES)
        if not chunk:
            return
        yield chunk


@contextmanager
def failures_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(f"{path}: no such file") from None
    except OSError as error:
        raise FetchError(f"{path}: cannot be read ({error.strerror})") from None


class HTTPStore(Store):
    def __init__(self, url: str, timeout_s: float) -> None:
        super().__init__(redacted(url))
        parts = urlsplit(url)
        user, at, host = parts.netloc.rpartition("@")
        self.headers: dict[str, str] = {}
        if at:
            token = base64.b64encode(unquote(user).encode()).decode("ascii")
            self.headers["Authorization"] = f"Basic {token}"
        self.url = urlunsplit(parts._replace(netloc=host))
        self.timeout_s = timeout_s

    def open(self, name: str, closing: Event, headers: dict[str, str] | None = None) -> AbstractContextManager[Body]:
        url, own = self.address(name)
        return get(Request(url, f"{self.source}/{name}", {**own, **(headers or {})}), self.timeout_s, closing)

    def address(self, name: str) -> tuple[str, dict[str, str]]:
        """URL and headers by which a file is asked for; both may hold secrets."""
        return below(self.url, name), self.headers


class ClientStore(HTTPStore):
    """A store whose addresses a library signs. It makes no connections for it but to renew credentials."""

    def __init__(self, url: str, timeout_s: float) -> None:
        super().__init__(url, timeout_s)
        self.bucket, self.prefix = bucket_and_prefix(url)
        self._client: Any = None
        self._lock = Lock()

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}".lstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()
