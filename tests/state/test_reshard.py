"""The same checkpoint in another number of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rae_scale.engines import Engine
from rae_scale.parallel import Mesh
from rae_scale.state import CheckpointError, load_checkpoint, read_state, reshard_checkpoint, save_checkpoint
from rae_scale.state import reshard as reshard_module
from rae_scale.state.format import damaged_files
from rae_scale.state.index import read_index
from rae_scale.state.read import PieceReader


@pytest.fixture
def saved(engine: Engine, mesh: Mesh, tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path, 2, engine, mesh, {"seed": 3}, keep_last=1)


@pytest.mark.parametrize("files", [1, 2, 3, 5, 40])
def test_it_loads_the_same_and_a_second_time_too(
    files: int, saved: Path, engine: Engine, build: Callable[..., Engine], mesh: Mesh, tmp_path: Path
) -> None:
    out = reshard_checkpoint(saved, tmp_path / "out" / "new", files)
    assert {path.name for path in out.iterdir()} == {
        *(f"part-{number:05d}.safetensors" for number in range(files)),
        "index.json",
        "state.json",
        "manifest.json",
    }
    assert [path.name for path in out.parent.iterdir()] == ["new"]
    assert damaged_files(out) == []
    assert read_state(out) == read_state(saved)
    expected = {(p.kind, p.name): p.tensor for p in engine.pieces()}
    for checkpoint in (out, reshard_checkpoint(out, tmp_path / "again", 4)):
        loaded = build()
        assert load_checkpoint(checkpoint, loaded, mesh)["optimizer_step"] == 2
        assert all(torch.equal(p.tensor, expected[p.kind, p.name]) for p in loaded.pieces())
    assert list(read_index(out)) == list(read_index(saved))


def test_files_are_even_and_tensors_are_split_by_rows(saved: Path, tmp_path: Path) -> None:
    out = reshard_checkpoint(saved, tmp_path / "new", 3)
    index = read_index(out)
    queries = index["conditioner.queries"].pieces["ema"]  # [6, 12]
    assert [(stored.box.start, stored.box.stop, stored.file) for stored in queries] == [
        ((0, 0), (2, 12), "part-00000.safetensors"),
        ((2, 0), (4, 12), "part-00001.safetensors"),
        ((4, 0), (6, 12), "part-00002.safetensors"),
    ]
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    assert max(sizes) < 1.1 * min(sizes)
    many = reshard_checkpoint(saved, tmp_path / "many", 7)
    assert len(read_index(many)["conditioner.queries"].pieces["ema"]) == 1, "fewer rows than files: whole"
    sizes = [path.stat().st_size for path in many.glob("*.safetensors")]
    assert max(sizes) < 1.2 * min(sizes)


def test_whole_tensors_fill_the_files_evenly(saved: Path) -> None:
    index = read_index(saved)
    sizes = [sum(box.numel for _, _, box in share) for share in reshard_module.plan(index, 40)]
    largest = max(entry.numel for entry in index.values() if entry.shape[0] < 40)
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= largest


def test_no_read_is_larger_than_a_chunk(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, sizes = PieceReader.read, []
    chunks = PieceReader.chunks
    monkeypatch.setattr(PieceReader, "chunks", lambda self, kind, name, box: chunks(self, kind, name, box, 100))
    monkeypatch.setattr(
        PieceReader,
        "read",
        lambda self, kind, name, box: sizes.append(box.numel * 4) or read(self, kind, name, box),
    )
    out = reshard_checkpoint(saved, tmp_path / "new", 2)
    assert max(sizes) == 100
    assert damaged_files(out) == []


def test_what_exists_is_not_written_over(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"out exists; reshard into a new folder"):
        reshard_checkpoint(saved, tmp_path / "out", 2)
    with pytest.raises(ValueError, match=r"files=0: .* 1 file or more"):
        reshard_checkpoint(saved, tmp_path / "new", 0)
    assert not (tmp_path / "new").exists()


def test_a_damaged_source_is_refused_by_file(saved: Path, tmp_path: Path) -> None:
    path = saved / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors is damaged"):
        reshard_checkpoint(saved, tmp_path / "new", 2)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("stage", ["write_tensors", "describe"])
def test_interrupted_it_leaves_no_folder_of_that_name(
    stage: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reshard_module, stage, killed)
        with pytest.raises(KeyboardInterrupt):
            reshard_checkpoint(saved, tmp_path / "new", 2)
    assert not (tmp_path / "new").exists()
    assert damaged_files(reshard_checkpoint(saved, tmp_path / "new", 2)) == []
    assert not (tmp_path / ".new.tmp").exists()
