from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.read_options import ReadOptions
from rae_scale.data.remote import retry
from tests.data.hostile_server import HostileServer, serve


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HostileServer]:
    with serve(tmp_path) as running:
        yield running


@pytest.fixture
def remote(server: HostileServer, tmp_path: Path) -> Callable[..., MDSReader]:
    """remote(folder, **options) -> reader of a folder below tmp_path, over HTTP, with the cache `tmp_path/cache`."""

    def open_reader(folder: Path, **options: object) -> MDSReader:
        given = {"cache_dir": tmp_path / "cache", "fetch_timeout_s": 5.0, "fetch_attempts": 3, **options}
        return MDSReader(f"{server.url}/{folder.name}", ReadOptions(**given))  # type: ignore[arg-type]

    return open_reader


def cached(tmp_path: Path, suffix: str = ".mds") -> list[Path]:
    return sorted((tmp_path / "cache").glob(f"*/*{suffix}"))
