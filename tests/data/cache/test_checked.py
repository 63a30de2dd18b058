"""A shard is hashed once by a process and those that it starts, however many they are."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import pytest

from rae_scale.data.mds_reader import BadShard, MDSReader


def damage_unseen(shard: Path) -> None:
    """As a disk does, without a new time of last change."""
    state = shard.stat()
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_what_a_worker_has_checked_the_others_do_not_check_again(shards) -> None:
    folder = shards(3, shard_bytes=10**6)
    reader = MDSReader(folder)
    worker = multiprocessing.get_context("spawn").Process(target=reader.__getitem__, args=(0,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    damage_unseen(folder / "shard.00000.mds")
    copy = pickle.loads(pickle.dumps(reader))
    reader[0]  # not hashed: the worker did that
    with pytest.raises(BadShard):
        copy[0]


def test_it_is_checked_again_after_a_change(shards) -> None:
    folder = shards(3, shard_bytes=10**6)
    reader = MDSReader(folder)
    reader[0]
    reader.close()
    damage_unseen(folder / "shard.00000.mds")
    os.utime(folder / "shard.00000.mds")
    with pytest.raises(BadShard):
        reader[0]
