from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rae_scale.data.mds_reader import BadShard, MDSReader
from tests.data.cache.conftest import cached
from tests.data.hostile_server import HostileServer

Remote = Callable[..., MDSReader]


def prefetched(reader: MDSReader, numbers: list[int]) -> None:
    reader.prefetch(numbers)
    assert reader._prefetcher is not None and reader._prefetcher.wait(30)


def test_what_was_prefetched_is_not_asked_for_again(
    shards, remote: Remote, server: HostileServer, tmp_path: Path
) -> None:
    folder = shards(20)
    reader = remote(folder)
    assert reader.fetches and not MDSReader(folder).fetches
    prefetched(reader, [1, 2, 1])
    assert [path.stem for path in cached(tmp_path)] == ["000001", "000002"]
    asked = len(server.requests)
    assert [sample.key for sample in reader] == [f"mds-{index}" for index in range(20)]
    assert len(server.requests) == asked + len(reader.sizes) - 2
    reader.close()


def test_what_fails_is_left_to_the_read(shards, remote: Remote, server: HostileServer) -> None:
    folder = shards(20)
    (folder / "shard.00001.mds").unlink()
    reader = remote(folder)
    server.faults["shard.00000.mds"] = [500] * 3
    prefetched(reader, [0, 1])
    assert reader[0].key == "mds-0"
    with pytest.raises(BadShard, match="404"):
        reader[int(reader.sizes[0])]
    reader.close()


def test_closing_ends_a_fetch_that_waits(shards, remote: Remote, server: HostileServer, tmp_path: Path) -> None:
    reader = remote(shards(20), fetch_attempts=1000)
    server.faults["shard.00000.mds"] = ["drip"] * 1000
    reader.prefetch([0])
    while not cached(tmp_path, ".part"):
        assert reader._prefetcher is not None and not reader._prefetcher.wait(0.01)
    reader.close()
    assert [thread.name for thread in threading.enumerate() if "prefetch" in thread.name] == []
    assert cached(tmp_path, ".part") == []
    server.faults.clear()
    assert reader[0].key == "mds-0"
    prefetched(reader, [1])  # it can be used again
    reader.close()
