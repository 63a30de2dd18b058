"""Folders are tried as training will use them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from rae_scale.config import Config, parse_config
from rae_scale.data.mds_writer import MDSWriter
from rae_scale.data.record import Sample
from rae_scale.preflight import files
from rae_scale.preflight.files import (
    file_system,
    is_on_network,
    probe_caches,
    probe_inputs,
    probe_run_dir,
    probe_shard_cache,
)
from tests.data.hostile_server import serve


def test_a_run_dir_is_made_and_left_empty(tmp_path: Path) -> None:
    found = probe_run_dir(tmp_path / "new/run")
    assert found.problem == ""
    assert found.free > 0
    assert found.file_system
    assert list((tmp_path / "new/run").iterdir()) == []


def test_a_run_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    assert "File exists" in probe_run_dir(tmp_path / "run").problem


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_file_system_that_cannot_synchronise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (kind == "folder"):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    assert "Input/output error" in probe_run_dir(tmp_path).problem
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_file_system_that_cannot_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", refuse)
    assert "Input/output error" in probe_run_dir(tmp_path).problem
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_counted(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints/.step-00000003.tmp").mkdir()
    assert probe_run_dir(tmp_path).checkpoints == 2


def config_with(**paths: str) -> Config:
    model = {name: {"path": path} for name, path in paths.items() if name in ("llm", "encoder", "decoder")}
    sources = [{"path": paths["data"]}] if "data" in paths else []
    return parse_config({"model": model, "data": {"sources": sources}})


def test_inputs_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    writer = MDSWriter(tmp_path / "shards")
    writer.write(Sample("one", b"bytes of a picture", ("a circle",)))
    writer.finish()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.safetensors").write_bytes(bytes(8))
    config = config_with(data=str(tmp_path / "shards"), encoder=str(tmp_path / "weights"), decoder="asset:demo/decoder")
    found = {entry.setting: entry for entry in probe_inputs(config)}
    assert set(found) == {"data.sources[0].path", "model.encoder.path", "model.decoder.path"}
    assert found["data.sources[0].path"].content == "1 samples"
    assert all(not entry.problem for entry in found.values()), found


def test_inputs_that_cannot(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = config_with(
        data=str(tmp_path / "empty"),
        llm="nobody/has-this-model",
        encoder=str(tmp_path / "none"),
        decoder="asset:nothing",
    )
    problems = {entry.setting: entry.problem for entry in probe_inputs(config)}
    assert "no such file" in problems["data.sources[0].path"]
    assert "each rank would download it" in problems["model.llm.path"]
    assert "no such file or folder" in problems["model.encoder.path"]
    assert "no such asset" in problems["model.decoder.path"]


def test_kinds_of_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/a / ext4 rw 0 0\nserver:/home {tmp_path} nfs4 rw 0 0\ntmpfs {tmp_path}/fast tmpfs rw 0 0\n"
    )
    monkeypatch.setattr(files, "MOUNTS", mounts)
    assert file_system(Path("/")) == "ext4"
    assert file_system(tmp_path / "x/y") == "nfs4"
    assert file_system(tmp_path / "fast/x") == "tmpfs"
    assert file_system(tmp_path / "faster") == "nfs4"
    assert [
        kind
        for kind in ("nfs4", "lustre", "fuse.sshfs", "fuse.overlayfs", "ext4", "overlay", "tmpfs")
        if is_on_network(kind)
    ] == ["nfs4", "lustre", "fuse.sshfs"]


def test_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not/yet"))
    triton, _ = probe_caches(config_with())
    assert triton.path == str(tmp_path / "not/yet")
    assert triton.file_system == file_system(tmp_path)
    assert triton.problem == ""


def test_a_remote_source_is_reached_and_its_cache_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "shards").mkdir()
    writer = MDSWriter(tmp_path / "shards")
    writer.write(Sample("one", b"bytes of a picture", ("a circle",)))
    writer.finish()
    with serve(tmp_path) as server:
        data = {"sources": [{"path": f"{server.url}/shards"}], "cache_dir": str(tmp_path / "cache"), "cache_gb": 0.001}
        config = parse_config({"data": data})
        (found,) = probe_inputs(config)
        assert (found.content, found.problem) == ("1 samples", "")
        assert probe_shard_cache(config.data).problem == ""
        assert "room for" in probe_shard_cache(config.data.model_copy(update={"cache_gb": 1e9})).problem
        assert not list((tmp_path / "cache").glob("*/*.mds"))  # nothing was fetched for it
        server.faults["shard.00000.mds"] = [403]
        (found,) = probe_inputs(config)
        assert "the server answered 403" in found.problem
    assert len(list(probe_caches(config))) == 3
    config = config_with(data="hdfs://there")
    assert [entry.problem.partition(";")[0] for entry in probe_inputs(config)] == ["hdfs://there: hdfs:// is not read"]
    assert len(list(probe_caches(config))) == 2
