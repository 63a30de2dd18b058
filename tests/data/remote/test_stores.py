from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from rae_scale.data.cache import read_index
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.read_options import ReadOptions
from rae_scale.data.remote import open_store
from rae_scale.data.remote.gcs import GCSStore
from rae_scale.data.remote.urls import below, is_remote, local_folder, redacted
from tests.data.hostile_server import HostileServer, serve


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with serve(tmp_path) as running:
        yield running


def test_urls() -> None:
    assert [is_remote(path) for path in ("s3://b/f", "gs://b", "http://h/f", "https://h", "file:///f", "f", "/f")] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip
    assert local_folder("file:///data/a%20b") == Path("/data/a b")
    assert local_folder("data/x") == Path("data/x")
    assert redacted("https://user:secret@host:8/f/?sig=secret#x") == "https://host:8/f"
    assert below("https://host/f/?sig=a%2Bb", "unit 1/shard#0.mds") == "https://host/f/unit%201/shard%230.mds?sig=a%2Bb"
    with pytest.raises(ValueError, match=r"hdfs:// is not read; .* s3://, gs:// or file://"):
        is_remote("hdfs://x/y")
    with pytest.raises(ValueError, match="names the host 'host'"):
        local_folder("file://host/f")
    for url in ("s3://", "s3://key:secret@bucket/f", "s3://bucket/f?token=secret"):
        with pytest.raises(ValueError, match="give s3://bucket/folder") as problem:
            open_store(url, 1.0)
        assert "secret" not in str(problem.value)


def test_a_file_url_is_a_local_folder(shards) -> None:
    folder = shards(3)
    assert list(MDSReader(folder.as_uri())) == list(MDSReader(folder))


def test_s3_requests_are_signed(shards, server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket").mkdir()
    expected = list(MDSReader(shards(3, "bucket/a b")))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    options = ReadOptions(cache_dir=tmp_path / "cache", fetch_attempts=1)
    reader = MDSReader("s3://bucket/a b", options)
    assert reader.source == "s3://bucket/a b"
    assert list(reader) == expected
    asked = urlsplit(server.requests[-1].path)
    assert asked.path == "/bucket/a%20b/shard.00000.mds"
    query = parse_qs(asked.query)
    assert query["X-Amz-Credential"][0].startswith("AKEY/") and "/eu-west-1/s3/" in query["X-Amz-Credential"][0]
    assert query["X-Amz-Signature"]
    server.faults["index.json"] = [403]
    with pytest.raises(ValueError, match=r"s3://bucket/a b/index\.json: the server answered 403") as problem:
        read_index(reader._store, ReadOptions(cache_dir=tmp_path / "other"))
    assert "AKEY" not in str(problem.value) and "Signature" not in str(problem.value)


def test_s3_without_credentials_is_anonymous(
    shards, server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bucket").mkdir()
    shards(3, "bucket/mds")
    monkeypatch.setenv("S3_ENDPOINT_URL", server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert len(MDSReader("s3://bucket/mds", ReadOptions(cache_dir=tmp_path / "cache"))) == 3
    assert server.requests[-1].path == "/bucket/mds/index.json"


def test_gcs(shards, server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket").mkdir()
    expected = list(MDSReader(shards(3, "bucket/mds")))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url.removeprefix("http://"))
    reader = MDSReader("gs://bucket/mds", ReadOptions(cache_dir=tmp_path / "cache", fetch_attempts=1))
    assert (reader.source, list(reader)) == ("gs://bucket/mds", expected)
    assert server.requests[-1].path == "/bucket/mds/shard.00000.mds"
    assert "Authorization" not in server.requests[-1].headers


def test_gcs_sends_a_token_and_renews_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from google.auth.credentials import Credentials

    class Account(Credentials):
        renewed = 0

        def refresh(self, request: object) -> None:
            self.renewed += 1
            self.token = f"token {self.renewed}"

    account = Account()
    monkeypatch.setattr("google.auth.default", lambda scopes: (account, None))
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    store = GCSStore("gs://bucket/folder", 1.0)
    expected = "https://storage.googleapis.com/bucket/folder/x.mds", {"Authorization": "Bearer token 1"}
    assert store.address("x.mds") == store.address("x.mds") == expected
    store = pickle.loads(pickle.dumps(store))  # without the credentials
    account.token = None
    assert store.address("x.mds")[1] == {"Authorization": "Bearer token 2"}


@pytest.mark.parametrize(("url", "module", "extra"), [("s3://b/f", "boto3", "s3"), ("gs://b/f", "google.auth", "gcs")])
def test_a_missing_library_is_named(
    url: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ValueError, match=rf"pip install 'rae-scale\[{extra}\]'"):
        MDSReader(url, ReadOptions(cache_dir=tmp_path))
