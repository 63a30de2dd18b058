"""The index of a source: read where it lies, or kept on this machine and asked for again only if it has changed.

`<cache>/<source>/index` is one line of JSON (the ETag that the server gave, the hash of the rest), then the index.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from threading import Event

import xxhash

from rae_scale.data.cache.folder import CacheFolder, failures_named
from rae_scale.data.mds_format import INDEX_NAME
from rae_scale.data.read_options import ReadOptions
from rae_scale.data.remote import MissingFile, Store, with_retries

MAX_INDEX_BYTES = 2**30


def fingerprint_of(index: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(index)


def read_index(store: Store, options: ReadOptions) -> bytes:
    """The index as it is now. Raises ValueError when there is none, and FetchError."""
    if not store.remote:
        return fetch_index(store, options, "", b"")[1]
    cache = CacheFolder(options.cache_dir, options.cache_gb)
    with failures_named(cache.root, options.cache_gb):
        path = cache.folder(xxhash.xxh3_64_hexdigest(store.source)) / "index"
        kept = read_kept(path)
        etag, data = fetch_index(store, options, *kept)
        if etag and (etag, data) != kept:
            keep(path, etag, data)
        return data


def fetch_index(store: Store, options: ReadOptions, etag: str, data: bytes) -> tuple[str, bytes]:
    """(ETag, index); those given, when the server says that they are current."""
    where = f"{store.source}/{INDEX_NAME}"

    def fetch() -> tuple[str, bytes]:
        with store.open(INDEX_NAME, Event(), {"If-None-Match": etag} if etag else None) as body:
            if body.unchanged:
                return etag, data
            read = bytearray()
            for chunk in body.chunks:
                read += chunk
                if len(read) > MAX_INDEX_BYTES:
                    raise ValueError(f"{where}: more than {MAX_INDEX_BYTES} bytes; not an MDS index")
            return body.etag, bytes(read)

    try:
        return with_retries(fetch, options.fetch_attempts, where, Event())
    except MissingFile as error:
        raise ValueError(f"{error}; give the folder of shards that `rae-scale data build` wrote") from None


def read_kept(path: Path) -> tuple[str, bytes]:
    """(ETag, index), both empty when there is none or it is not what was written."""
    try:
        head, _, data = path.read_bytes().partition(b"\n")
        said = json.loads(head)
        if said["hash"] == fingerprint_of(data):
            return str(said["etag"]), data
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return "", b""


def keep(path: Path, etag: str, data: bytes) -> None:
    descriptor, name = tempfile.mkstemp(".new", "index.", path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(json.dumps({"etag": etag, "hash": fingerprint_of(data)}).encode("ascii") + b"\n")
            file.write(data)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
