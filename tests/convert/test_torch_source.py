"""Weights in files of torch.save, packed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zstandard

from rae_scale.convert import unpack as unpack_module
from rae_scale.convert.convert import convert
from rae_scale.convert.open import open_source
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state import CheckpointError, read_weights

STATE = {"model.embed_tokens.weight": torch.randn(50, 40), "model.norm.weight": torch.randn(40).bfloat16()}


@pytest.mark.parametrize(
    ("wrap", "kinds"),
    [
        (lambda state: state, {"weight"}),
        (lambda state: {"model": state, "optimizer": {"state": {}}, "step": 3}, {"weight"}),
        (lambda state: {"state_dict": state}, {"weight"}),
        (lambda state: {"model": state, "ema": {name: 2 * t for name, t in state.items()}}, {"weight", "ema"}),
    ],
)
def test_state_dicts(wrap: Callable[[Any], Any], kinds: set[str], tmp_path: Path) -> None:
    torch.save(wrap(STATE), tmp_path / "model.pth")
    with open_source(tmp_path / "model.pth") as source:
        source.check()
        assert source.naming == "llm" and source.forms.keys() == kinds
        for name, tensor in STATE.items():
            assert torch.equal(source.read("weight", name, whole(tensor.shape)), tensor)
            if "ema" in kinds:
                assert torch.equal(source.read("ema", name, whole(tensor.shape)), 2 * tensor)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "but list"),
        ({}, "but an empty dict"),
        ({"a": 1, "b": torch.ones(1)}, "but a, b"),
        ({"model": {"x": 3}}, "but model"),
        (torch.ones(2), "but StoredTensor"),
    ],
)
def test_no_state_dict(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=f"holds no state dict.* {message}"):
        open_source(tmp_path / "model.pt")


def pack(path: Path, frames: int = 1, **settings: Any) -> Path:
    data = path.read_bytes()
    size = -(-len(data) // frames)
    packed = path.with_name(path.name + ".zst")
    parts = (data[start : start + size] for start in range(0, len(data), size))
    packed.write_bytes(b"".join(zstandard.ZstdCompressor(**settings).compress(part) for part in parts))
    return packed


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.parametrize(("frames", "settings"), [(1, {}), (3, {}), (2, {"write_content_size": False})])
@pytest.mark.parametrize("block", [1 << 22, 1000])
def test_packed_files(
    frames: int, settings: Any, block: int, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack_module, "READ_BYTES", block)
    torch.save({"model": STATE}, tmp_path / "model.pth")
    with open_source(pack(tmp_path / "model.pth", frames, **settings)) as source:
        source.check()
        assert torch.equal(
            source.read("weight", "model.embed_tokens.weight", Box((10, 3), (20, 9))),
            STATE["model.embed_tokens.weight"][10:20, 3:9],
        )
        assert not list(temporary.iterdir()), "it has no name, so that nothing can be left behind"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-20], "is cut off: its last frame has no end"),
        (lambda data: data[: len(data) // 2 + 7], "is cut off: its last frame has no end"),
        (lambda data: b"", "is cut off"),
        (lambda data: data[:400] + b"\xff" * 50 + data[450:], "is damaged"),
        (lambda data: b"no zstd at all", "is damaged"),
    ],
)
def test_packed_files_that_are_damaged(
    damage: Callable[[bytes], bytes], message: str, temporary: Path, tmp_path: Path
) -> None:
    torch.save(STATE, tmp_path / "model.pth")
    packed = pack(tmp_path / "model.pth", 2, write_checksum=True)
    packed.write_bytes(damage(packed.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"model\.pth\.zst {message}"):
        open_source(packed)
    assert not list(temporary.iterdir())


def test_no_room_to_unpack(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(STATE, tmp_path / "model.pth")
    packed = pack(tmp_path / "model.pth")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(CheckpointError, match=rf"unpacked needs 0\.0 GB, and {temporary} has .* left; set TMPDIR"):
        open_source(packed)


def folder_of(folder: Path, files: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    for name, content in files.items():
        torch.save(content, folder / name)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "qwen2"}))
    return folder


def test_folders(tmp_path: Path) -> None:
    parts = {f"pytorch_model-{number}.bin": {name: tensor} for number, (name, tensor) in enumerate(STATE.items())}
    folder = folder_of(tmp_path / "parts", parts)
    with pytest.raises(CheckpointError, match=r"has pytorch_model-0\.bin, pytorch_model-1\.bin among .* no index"):
        open_source(folder)
    index = {"weight_map": {name: file for file, state in parts.items() for name in state}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with open_source(folder) as source:
        assert source.forms["weight"].keys() == STATE.keys() and source.facts.foreign == {"model_type": "qwen2"}
    torch.save(STATE, folder / "pytorch_model-0.bin")
    with pytest.raises(CheckpointError, match=r"has model\.norm\.weight, which another file of .* has too"):
        open_source(folder)
    (folder / "pytorch_model-1.bin").unlink()
    with pytest.raises(CheckpointError, match=r"lists pytorch_model-1\.bin, which is not there"):
        open_source(folder)


def test_a_pickle_that_would_run_is_refused_by_the_conversion(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("pwned",)

    torch.save({**STATE, "evil": Evil()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt: its pickle names __builtin__\.print"):
        convert(tmp_path / "model.pt", tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


def test_a_state_dict_under_our_names(tmp_path: Path) -> None:
    state = {"dit.x_embed.bias": torch.randn(5), "dit.x_embed.weight": torch.randn(5, 2).t().contiguous().t()}
    torch.save(state, tmp_path / "model.pt")
    out = convert(tmp_path / "model.pt", tmp_path / "out", "native", verify=True).out
    weights = read_weights(out)
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())
