"""Checked shards, and the cache that the processes of a machine share for those of remote sources.

mosaicml-streaming trusts a file that is there, waits without end for a process that died while it fetched, and its
limit can remove the only copy of a local source. Here a file is checked by each process that opens it, the kernel
releases the lock of a process that dies, and a local source is not in the cache at all.
"""

from __future__ import annotations

import logging
from pathlib import Path

import xxhash

from rae_scale.data.cache.check import DamagedShard
from rae_scale.data.cache.index_file import fingerprint_of, read_index
from rae_scale.data.cache.prefetch import Prefetcher
from rae_scale.data.cache.shards import CachedShards, LocalShards, ShardFiles
from rae_scale.data.mds_index import MDSIndex
from rae_scale.data.read_options import ReadOptions
from rae_scale.data.remote import Store
from rae_scale.data.remote.stores import FolderStore

__all__ = ["CachedShards", "DamagedShard", "Prefetcher", "ShardFiles", "fingerprint_of", "read_index", "shard_files"]

logger = logging.getLogger(__name__)


def shard_files(store: Store, index: MDSIndex, fingerprint: str, options: ReadOptions) -> ShardFiles:
    """Of a local folder the files themselves, of everything else (and of compressed shards) copies in the cache."""
    if any(form.hash is None for form in index.formats):
        logger.warning("%s: has shards without a hash; only their sizes and offsets can be checked", store.source)
    if isinstance(store, FolderStore) and all(form.compression is None for form in index.formats):
        return LocalShards(store.folder, store, index, options)
    # The place is part of it: an index without hashes is the same for other data of the same sizes.
    place = str(Path(store.source).resolve()) if isinstance(store, FolderStore) else store.source
    return CachedShards(store, index, options, xxhash.xxh3_64_hexdigest(f"{place}:{fingerprint}"))
