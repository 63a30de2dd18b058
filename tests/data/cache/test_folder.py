"""The limit, and processes that share the folder, die in it or find it changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from rae_scale.data.cache import folder as cache_folder
from rae_scale.data.cache.folder import CacheFolder, NoRoom, is_abandoned, private_folder
from rae_scale.data.cache.locks import LockBusy, lock
from rae_scale.data.mds_reader import MDSReader
from tests.data.cache.conftest import cached
from tests.data.hostile_server import HostileServer

Remote = Callable[..., MDSReader]
ROOT = Path(__file__).resolve().parents[3]

# Reads every sample in an order of its own, and says what it read.
READ_ALL = """
import random, sys, xxhash
from pathlib import Path
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.read_options import ReadOptions

url, cache, gb, seed = sys.argv[1:]
reader = MDSReader(url, ReadOptions(cache_dir=Path(cache), cache_gb=float(gb)))
order = random.Random(int(seed)).sample(range(len(reader)), len(reader))
found = {index: reader[index].image for index in order}
open_files = len(reader._files)
print(xxhash.xxh3_64_hexdigest(b"".join(found[index] for index in sorted(found))))
"""


def start_reader(server: HostileServer, cache: Path, gb: float, seed: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READ_ALL, f"{server.url}/mds", str(cache), str(gb), str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_four_processes_and_a_limit_of_two_shards(shards, server: HostileServer, tmp_path: Path) -> None:
    local = MDSReader(shards(24))
    assert len(local.sizes) >= 5
    expected = xxhash.xxh3_64_hexdigest(b"".join(sample.image or b"" for sample in local))
    limit = 2 * int(local.shard_bytes.max())
    readers = [start_reader(server, tmp_path / "cache", limit / 1e9, seed) for seed in range(4)]
    assert [reader.communicate()[0].strip() for reader in readers] == [expected] * 4
    assert sum(path.stat().st_size for path in cached(tmp_path)) <= limit
    assert cached(tmp_path, ".part") == []
    assert len(list((tmp_path / "mds").iterdir())) == 1 + len(local.sizes)  # the source is as it was


def test_a_process_that_dies_while_it_fetches_leaves_no_lock(
    shards, remote: Remote, server: HostileServer, tmp_path: Path
) -> None:
    folder = shards(1)
    reader = remote(folder)
    server.faults["shard.00000.mds"] = ["stall"]
    victim = start_reader(server, tmp_path / "cache", 1, 0)
    while not cached(tmp_path, ".part"):
        assert victim.poll() is None
        time.sleep(0.01)
    (part,) = cached(tmp_path, ".part")
    assert not is_abandoned(part)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert is_abandoned(part)
    assert reader[0].key == "mds-0"
    assert cached(tmp_path, ".part") == []


def test_what_was_used_last_stays(shards, remote: Remote, server: HostileServer, tmp_path: Path) -> None:
    folder = shards(24)
    size = int(MDSReader(folder).shard_bytes.max())
    reader = remote(folder, cache_gb=3.5 * size / 1e9)
    first = reader.locate(0)[0]
    for number in (0, 1, 2):
        reader._shards.open(number).close()
        os.utime(cached(tmp_path)[number], ns=(number, cached(tmp_path)[number].stat().st_mtime_ns))
    reader._shards.open(first).close()  # used again, so shard 1 is now the oldest
    reader._shards.open(3).close()
    assert [path.stem for path in cached(tmp_path)] == ["000000", "000002", "000003"]


def test_evicted_shards_are_let_go(shards, remote: Remote, tmp_path: Path) -> None:
    folder = shards(24)
    size = int(MDSReader(folder).shard_bytes.max())
    reader = remote(folder, cache_gb=2 * size / 1e9)
    assert len(list(reader)) == 24
    # The last two, and at most the one that was evicted for the last.
    assert len(reader._files) <= 3


def test_a_limit_below_one_shard_is_refused(shards, remote: Remote) -> None:
    folder = shards(3, shard_bytes=10**6)
    size = int(MDSReader(folder).shard_bytes[0])
    with pytest.raises(ValueError, match=rf"data\.cache_gb=1e-09 is less than one shard: .* of {size} bytes; set"):
        remote(folder, cache_gb=1e-9)


def test_parts_of_living_processes_count_and_stay(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, 1000 / 1e9)
    folder = cache.folder("source")
    with lock(folder / "lock", 0, 0):
        part = cache.make_part(folder / "000000.mds", 600, 0)
        with pytest.raises(NoRoom):
            cache.make_part(folder / "000001.mds", 600, 0.1)
        assert Path(str(part.name)).exists()
    cache.make_part(folder / "000001.mds", 600, 0).close()  # its process is gone, as far as locks tell
    assert not Path(str(part.name)).exists()
    part.close()


def test_locks_exclude_threads_and_are_one_per_number(tmp_path: Path) -> None:
    with lock(tmp_path / "lock", 5, 0):
        with pytest.raises(LockBusy), lock(tmp_path / "lock", 5, 0.05):
            pass
        with lock(tmp_path / "lock", 6, 0):
            pass
    with lock(tmp_path / "lock", 5, 0):
        pass


def test_the_folder_in_the_temporary_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder.tempfile, "gettempdir", lambda: str(tmp_path))
    path = private_folder()
    assert path == private_folder() and path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o777)
    with pytest.raises(ValueError, match=r"open to others; set data\.cache_dir"):
        private_folder()
    path.rmdir()
    path.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="belongs to somebody else"):
        private_folder()


def test_a_full_disk_is_an_error_that_leaves_nothing(
    shards, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = remote(shards(1))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rae_scale.data.cache.shards.write_all", full)
    with pytest.raises(ValueError, match=r"No space left on device; .*data\.cache_gb"):
        reader[0]
    assert cached(tmp_path, ".part") == []
