from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.read_options import ReadOptions
from rae_scale.data.remote.transfer import connection_pool
from tests.data.hostile_server import serve


def test_a_forked_child_has_connections_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = connection_pool("http://127.0.0.1:1")
    assert connection_pool("http://127.0.0.1:2") is pool
    child = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: child)
    assert connection_pool("http://127.0.0.1:1") is not pool


def test_the_proxy_of_the_machine_is_used(shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(3)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serve(tmp_path) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        reader = MDSReader("http://storage.invalid/mds", ReadOptions(cache_dir=tmp_path / "cache", fetch_attempts=1))
        assert len(list(reader)) == 3
        assert proxy.requests[0].path == "http://storage.invalid/mds/index.json"


def test_an_unknown_host_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    options = ReadOptions(cache_dir=tmp_path, fetch_attempts=1)
    with pytest.raises(ValueError, match=r"http://storage\.invalid/mds/index\.json: the name of its host is not known"):
        MDSReader("http://storage.invalid/mds", options)
