"""Shards over HTTP through the cache: every fault ends in the right bytes or in an error with a name, in bounded time,
and leaves no part of a file behind."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from traceback import format_exception

import pytest

from rae_scale.data.mds_reader import BadShard, MDSReader, source_fingerprint
from rae_scale.data.read_options import ReadOptions
from rae_scale.data.remote import FetchError
from tests.data.cache.conftest import cached
from tests.data.hostile_server import HostileServer

Remote = Callable[..., MDSReader]
FIRST = "shard.00000.mds"


def test_a_remote_source_reads_like_a_local_one(shards, remote: Remote, server: HostileServer, tmp_path: Path) -> None:
    folder = shards(20)
    local, reader = MDSReader(folder), remote(folder)
    assert (reader.source, reader.name) == (f"{server.url}/mds", "mds")
    assert reader.fingerprint == local.fingerprint == source_fingerprint(reader.source, reader.options)
    assert reader.sizes.tolist() == local.sizes.tolist()
    assert list(reader) == list(local)
    assert len(cached(tmp_path)) == len(reader.sizes)
    assert len(server.requests) == 2 + len(reader.sizes)
    assert cached(tmp_path, ".part") == []
    assert pickle.loads(pickle.dumps(reader))[7] == local[7]


@pytest.mark.parametrize("fault", [500, 503, 429, "reset", "short", "unsized", "redirect"])
def test_a_fault_that_passes_is_only_a_delay(
    shards, remote: Remote, server: HostileServer, fault: str | int, tmp_path: Path
) -> None:
    reader = remote(shards(1))
    server.faults[FIRST] = [fault, fault] if fault != "unsized" else [fault]
    assert reader[0].key == "mds-0"
    assert server.asked(FIRST) == (1 if fault == "unsized" else 3)
    assert cached(tmp_path, ".part") == []


@pytest.mark.parametrize("fault", ["stall", "drip"])
def test_a_server_that_does_not_go_on_is_given_up(
    shards, remote: Remote, server: HostileServer, fault: str, tmp_path: Path
) -> None:
    reader = remote(shards(1), fetch_timeout_s=0.1)
    server.faults[FIRST] = [fault]
    assert reader[0].key == "mds-0"
    assert server.asked(FIRST) == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, r"the server answered 500 .* \(tried 3 times\)"),
        ("reset", r"the connection broke off .* \(tried 3 times\)"),
        ("stall", r"no answer within data\.fetch_timeout_s=0\.1 \(tried 3 times\)"),
        ("drip", r".* too slow \(tried 3 times\)"),
        (403, r"the server answered 403 .*check the address and the credentials"),
    ],
)
def test_an_unreachable_source_ends_the_run_whatever_the_policy(
    shards, remote: Remote, server: HostileServer, fault: str | int, message: str, tmp_path: Path
) -> None:
    reader = remote(shards(1), fetch_timeout_s=0.1 if fault in ("stall", "drip") else 5.0)
    server.faults[FIRST] = [fault] * 9
    with pytest.raises(FetchError, match=rf"/mds/shard\.00000\.mds: {message}"):
        reader[0]
    assert server.asked(FIRST) == (1 if fault == 403 else 3)
    assert cached(tmp_path) == cached(tmp_path, ".part") == []
    server.faults.clear()
    assert reader[0].key == "mds-0"  # it is back


@pytest.mark.parametrize("fault", ["flip", "wrong", "long"])
def test_a_damaged_shard_is_fetched_once_more(
    shards, remote: Remote, server: HostileServer, fault: str, tmp_path: Path
) -> None:
    folder = shards(1)
    reader = remote(folder)
    server.faults[FIRST] = [fault]
    assert reader[0].key == "mds-0"
    assert server.asked(FIRST) == 2
    for run in (1, 2):
        server.faults[FIRST] = [fault] * 9
        server.requests.clear()
        if run == 1:
            cached(tmp_path)[0].unlink()
        reader = remote(folder)
        for _ in range(2):
            with pytest.raises(
                BadShard, match=r"bad shard: .*/mds/shard\.00000\.mds: .* where the index says|more than"
            ):
                reader[0]
        assert server.asked(FIRST) == 2  # twice in all, not twice per sample
        assert server.asked("index.json") == 2  # to open, and once to see that the source is the same
        assert cached(tmp_path) == cached(tmp_path, ".part") == []


def test_a_missing_shard_is_a_bad_one_and_the_others_are_read(shards, remote: Remote, server: HostileServer) -> None:
    folder = shards(20)
    expected = MDSReader(folder)[19]
    (folder / FIRST).unlink()
    reader = remote(folder)
    with pytest.raises(BadShard, match="the server answered 404"):
        reader[0]
    assert server.asked(FIRST) == 1
    assert reader[19] == expected


def test_the_policy_stop_ends_the_run(shards, remote: Remote, server: HostileServer) -> None:
    reader = remote(shards(3, shard_bytes=10**6), bad_shards="stop")
    server.faults[FIRST] = ["flip"] * 2
    with pytest.raises(ValueError, match=r"data\.bad_shards=quarantine to do without its 3 samples") as problem:
        reader[0]
    assert not isinstance(problem.value, BadShard)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_in_the_cache_is_never_read(
    shards, remote: Remote, server: HostileServer, damage: str, tmp_path: Path
) -> None:
    folder = shards(1)
    expected = remote(folder)[0]
    (path,) = cached(tmp_path)
    data = path.read_bytes()
    path.write_bytes({"flip": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-1], "empty": b""}[damage])
    assert remote(folder)[0] == expected
    assert path.read_bytes() == data
    assert server.asked(FIRST) == 2


def test_a_file_that_was_checked_is_checked_again_when_it_is_another(
    shards, remote: Remote, server: HostileServer, tmp_path: Path
) -> None:
    reader = remote(shards(1))
    expected = reader[0]
    reader.close()
    (path,) = cached(tmp_path)
    path.write_bytes(bytes(path.stat().st_size))
    assert reader[0] == expected
    assert server.asked(FIRST) == 2


def test_files_removed_from_the_cache_by_hand_are_fetched_again(shards, remote: Remote, tmp_path: Path) -> None:
    reader = remote(shards(20))
    expected = list(reader)
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file():
            path.unlink()
    assert list(reader) == expected  # from what is open
    reader.close()
    assert list(reader) == expected
    reader.close()
    shutil.rmtree(tmp_path / "cache")
    assert list(reader) == expected


def test_an_index_that_changes_under_the_run_is_refused(shards, remote: Remote, tmp_path: Path) -> None:
    folder = shards(5)
    reader = remote(folder)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    shards(6, shard_bytes=2000)
    with pytest.raises(ValueError, match=r"index\.json there has changed since this process read it") as problem:
        reader[0]
    assert not isinstance(problem.value, BadShard)
    assert len(remote(folder)) == 6


def test_the_index_is_fetched_once_per_machine_and_checked(
    shards, remote: Remote, server: HostileServer, tmp_path: Path
) -> None:
    folder = shards(5)
    fingerprint = remote(folder).fingerprint
    remote(folder)
    first, second = server.requests
    assert first.headers.get("If-None-Match") is None
    assert second.headers.get("If-None-Match")
    (kept,) = cached(tmp_path, "index")
    kept.write_bytes(kept.read_bytes()[:-3])
    assert remote(folder).fingerprint == fingerprint
    assert server.requests[-1].headers.get("If-None-Match") is None


@pytest.mark.parametrize("fault", [500, "reset", "short"])
def test_the_index_is_tried_again(
    shards, remote: Remote, server: HostileServer, fault: str | int, tmp_path: Path
) -> None:
    folder = shards(3)
    server.faults["index.json"] = [fault, fault]
    assert len(remote(folder)) == 3
    server.faults["index.json"] = [fault] * 3
    with pytest.raises(FetchError, match=r"index\.json: .*\(tried 3 times\)"):
        remote(folder, cache_dir=tmp_path / "other")


def test_a_missing_or_cut_index_is_named(shards, remote: Remote, tmp_path: Path) -> None:
    folder = shards(1)
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text[:-1])
    with pytest.raises(ValueError, match=r"/mds/index\.json: not a complete MDS index"):
        remote(folder)
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match=r"/mds/index\.json: the server answered 404.*give the folder of shards"):
        remote(folder)


def test_without_hashes_sizes_and_offsets_are_checked_and_it_is_said_once(
    shards, remote: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shards(20)
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shards"]:
        entry["raw_data"]["hashes"] = {}
    (folder / "index.json").write_text(json.dumps(index))
    reader = remote(folder)
    assert len(list(reader)) == 20
    assert caplog.text.count("shards without a hash; only their sizes and offsets can be checked") == 1
    data = bytearray((folder / FIRST).read_bytes())
    data[11] ^= 0xFF  # where the second sample begins
    (folder / FIRST).write_bytes(data)
    with pytest.raises(BadShard, match="out of order"):
        MDSReader(folder)[0]


def test_a_source_is_probed_without_being_fetched(
    shards, remote: Remote, server: HostileServer, tmp_path: Path
) -> None:
    folder = shards(1)
    reader = remote(folder)
    reader.probe(0)
    assert cached(tmp_path) == []
    (folder / FIRST).write_bytes(b"x" + (folder / FIRST).read_bytes()[1:])
    with pytest.raises(ValueError, match="does not begin as the index says"):
        reader.probe(0)
    (folder / FIRST).unlink()
    with pytest.raises(ValueError, match="404"):
        reader.probe(0)


def test_no_secret_is_shown(shards, server: HostileServer, tmp_path: Path) -> None:
    shards(1)
    options = ReadOptions(cache_dir=tmp_path / "cache", fetch_attempts=1)
    url = f"{server.url.replace('//', '//user:hunter2@')}/mds?sig=t0ken"
    reader = MDSReader(url, options)
    assert reader.source == f"{server.url}/mds"
    assert reader[0].key == "mds-0"
    assert server.requests[-1].headers["Authorization"] == "Basic dXNlcjpodW50ZXIy"
    assert server.requests[-1].path == "/mds/shard.00000.mds?sig=t0ken"
    server.faults["index.json"] = [500, 403, "reset", "stall", "drip"]
    messages = []
    for _ in range(5):
        with pytest.raises(ValueError) as problem:
            MDSReader(url, ReadOptions(cache_dir=tmp_path / "other", fetch_attempts=1, fetch_timeout_s=0.1))
        messages.append(str(problem.value))
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="no connection to its host") as problem:
        MDSReader(url, ReadOptions(cache_dir=tmp_path / "other", fetch_attempts=1, fetch_timeout_s=0.1))
    messages.append("".join(format_exception(problem.value)))
    written = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    for secret in ("hunter2", "t0ken", "dXNlcjpodW50ZXIy"):
        assert secret not in " ".join(messages) and secret.encode() not in written
