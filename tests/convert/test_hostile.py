"""Files that are damaged, mixed up, or made to mislead: each is refused with its name and what to do."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rae_scale.convert.convert import convert
from rae_scale.convert.open import open_source
from rae_scale.convert.recognise import naming_of
from rae_scale.convert.tensor_files import headers_of, read_header
from rae_scale.state import CheckpointError, latest_checkpoint
from tests.convert.conftest import Runs

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4), "c": torch.zeros(0)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    return path


def rewrite(path: Path, edit: Callable[[str], str]) -> None:
    """Put another header before the data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = edit(data[8 : 8 + length].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def with_entry(name: str, **changes: Any) -> Callable[[str], str]:
    def edit(text: str) -> str:
        content = json.loads(text)
        content[name] = {**content.get(name, {}), **changes}
        return json.dumps(content)

    return edit


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def test_the_header_of_a_sound_file(file: Path) -> None:
    forms = read_header(file).forms
    assert {name: form.shape for name, form in forms.items()} == {n: tuple(t.shape) for n, t in TENSORS.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut(path, 5), "its 5 bytes do not hold a safetensors header"),
        (lambda path: cut(path, 40), "do not hold a safetensors header"),
        (lambda path: cut(path, len(path.read_bytes()) - 1), "the file is cut off"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "1 bytes behind its last tensor belong to none"),
        (lambda path: path.write_bytes(b"\xff" * 100), "do not hold a safetensors header"),
        (lambda path: rewrite(path, lambda text: "{" + text[2:]), "its header is none of safetensors"),
        (lambda path: rewrite(path, lambda _: "[1]"), "its header is none of safetensors"),
        (lambda path: rewrite(path, lambda text: text.replace('"b"', '"a"')), "it has a twice"),
        (lambda path: rewrite(path, lambda text: text.replace('"dtype"', '"shape"', 1)), "it has shape twice"),
        (lambda path: rewrite(path, with_entry("b", data_offsets=[8, 24])), "b at bytes 8 to 24 overlaps"),
        (lambda path: rewrite(path, with_entry("b", data_offsets=[28, 44])), "leaves 4 bytes before it unused"),
        (lambda path: rewrite(path, with_entry("b", shape=[5])), r"b \[5\] needs 20 bytes and has 16"),
        (lambda path: rewrite(path, with_entry("b", shape=[400], data_offsets=[24, 1624])), "the file is cut off"),
        (lambda path: rewrite(path, with_entry("b", shape=[-4])), r"b has shape \[-4\]"),
        (lambda path: rewrite(path, with_entry("b", data_offsets=["0", 1])), "none of safetensors|has shape"),
        (lambda path: rewrite(path, with_entry("b", dtype="I32")), r"b \(I32\): weights are of dtype F32, BF16, F16"),
    ],
)
def test_headers(damage: Callable[[Path], Any], message: str, file: Path) -> None:
    damage(file)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(file)
    assert str(file) in str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files and their index."""
    tensors = list(TENSORS.items())
    files = {"model-1.safetensors": dict(tensors[:1]), "model-2.safetensors": dict(tensors[1:])}
    for name, held in files.items():
        save_file(held, tmp_path / name, {"step": "3"})
    weight_map = {tensor: name for name, held in files.items() for tensor in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def edit_map(edit: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        edit(content["weight_map"])
        index.write_text(json.dumps(content))

    return change


def edit_index(edit: Callable[[str], str]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        index.write_text(edit(index.read_text()))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_map(lambda m: m.update(b="model-1.safetensors")), r"has b in model-1.* and it is in model-2"),
        (edit_map(lambda m: m.pop("b")), r"has b in None, and it is in model-2"),
        (edit_map(lambda m: m.update(x="model-1.safetensors")), r"has x in model-1.*, and it is in None"),
        (edit_map(lambda m: m.update(x="model-3.safetensors")), r"lists model-3\.safetensors, which .* does not have"),
        (edit_map(lambda m: m.update(x="../evil.safetensors")), "names files outside the folder"),
        (edit_index(lambda text: text.replace('"b"', '"a"')), "it has a twice"),
        (edit_index(lambda text: text[:-3]), "it is no index of weights"),
        (edit_index(lambda _: '{"weight_map": {}}'), "its weight_map is empty"),
        (
            lambda f: save_file(TENSORS, f / "model-3.safetensors"),
            r"model-3\.safetensors is not in",
        ),
        (lambda f: save_file(TENSORS, f / "model.safetensors"), r"remove the one that is out of date"),
        (lambda f: (f / "model-1.safetensors").rename(f / "model-9.safetensors"), "lists model-1"),
    ],
)
def test_folders(damage: Callable[[Path], Any], message: str, folder: Path) -> None:
    assert len(headers_of(folder)) == 2
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        headers_of(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("metadata", [{"step": "4"}, {"step": "3", "kind": "ema"}])
def test_files_of_two_checkpoints(metadata: dict[str, str], folder: Path) -> None:
    path = folder / "model-2.safetensors"
    save_file(load_file(path), path, metadata)
    with pytest.raises(CheckpointError, match=r"model-1.* and .*model-2.*: files of two checkpoints are mixed here"):
        open_source(folder)


@pytest.fixture
def official(runs: Runs, tmp_path: Path) -> Path:
    return convert(runs.untied, tmp_path / "official", "official", weights="weight").out


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def flip(path: Path, position: int = -1, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(data)


def test_a_flipped_bit_where_there_is_a_hash(official: Path, tmp_path: Path) -> None:
    flip(weights_of(official))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors is damaged"):
        convert(official, tmp_path / "out", "native")
    assert not list(tmp_path.glob("*out*"))


def test_damage_is_named_and_not_what_it_leads_to(official: Path, tmp_path: Path) -> None:
    """Here a number that is too large: the hash is compared when all is read."""
    flip(weights_of(official), bit=0x40)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors is damaged"):
        convert(official, tmp_path / "out", "native", dtype="float16")


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """In a folder without hashes, as other programs write them."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    (path.parent / "manifest.json").unlink()
    (path.parent / "model.safetensors.index.json").unlink()
    path.rename(path.with_name("model.safetensors"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({"model.evil": torch.ones(2)}), r"model\.evil \[2\] is not part of this model"),
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight \[48\] is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(47)}), r"model\.norm\.weight is \[47\] there, \[48\] in"),
        (lambda t: t["diff_head.model.pos_embed"].add_(0.1), r"pos_embed differs from the fixed table"),
    ],
)
def test_foreign_and_missing_tensors(edit: Any, message: str, official: Path, tmp_path: Path) -> None:
    edit_tensors(weights_of(official), edit)
    with pytest.raises(CheckpointError, match=message):
        convert(official, tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def checkpoint(runs: Runs, tmp_path: Path) -> Path:
    source = latest_checkpoint(runs.decoder)
    assert source is not None
    return Path(shutil.copytree(source, tmp_path / source.name))


def edit_native(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        edit(index["tensors"])
        (folder / "index.json").write_text(json.dumps(index))

    return change


def move_piece(tensors: dict[str, Any]) -> None:
    tensors["norm.bias"]["pieces"]["weight"][0][2] = "rank-00007.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "rank-00000.safetensors").unlink(), r"rank-00000\.safetensors is missing"),
        (lambda f: cut(f / "rank-00000.safetensors", 1000), r"rank-00000\.safetensors is damaged"),
        (edit_native(lambda t: t["norm.bias"]["pieces"].pop("ema")), r"index\.json has ema/norm\.bias/0 as None"),
        (
            edit_native(lambda t: t["norm.bias"].update(shape=[33])),
            r"norm\.bias \[33\]: 32 elements are there",
        ),
        (edit_native(move_piece), r"norm\.bias in rank-00007\.safetensors, which manifest\.json does not list"),
    ],
)
def test_native_checkpoints(damage: Callable[[Path], Any], message: str, checkpoint: Path) -> None:
    open_source(checkpoint)
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        open_source(checkpoint)


def test_a_flipped_bit_in_a_native_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    flip(checkpoint / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors is damaged"):
        convert(checkpoint, tmp_path / "out", "checkpoint")


def test_what_is_no_checkpoint_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist"):
        open_source(tmp_path / "gone")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"of no format that is known here. Looked for:\n  native checkpoint:"):
        open_source(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no complete checkpoint yet"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("config", "names", "naming"),
    [
        ({"model_type": "cambrian_qwen"}, (), "official"),
        ({"model_type": "qwen2"}, (), "llm"),
        ({"model_type": "vit_mae"}, (), "official-decoder"),
        ({"_class_name": "AutoencoderRAE"}, (), "diffusers-decoder"),
        ({}, ("model.norm.weight", "model.embed_tokens.weight", "diff_head.model.pos_embed"), "official"),
        ({}, ("model.embed_tokens.weight",), "llm"),
        ({}, ("decoder_embed.bias", "decoder_layers.0.output.dense.bias"), "official-decoder"),
        ({}, ("decoder.decoder_layers.0.output.dense.bias",), "diffusers-decoder"),
        ({}, ("conditioner.latent_queries",), "native"),
        ({"transformers_version": "4"}, ("dit.x_embed.bias",), "native"),
    ],
)
def test_whose_names_they_are(config: dict[str, Any], names: tuple[str, ...], naming: str) -> None:
    assert naming_of(config, names, "it") == naming


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        ({"model_type": "llama"}, ("model.embed_tokens.weight",), "config.json says model_type='llama'; known are"),
        ({"_class_name": "AutoencoderKL"}, (), "_class_name='AutoencoderKL'"),
        (
            {},
            ("module.model.embed_tokens.weight",),
            r"\(module\.model\.embed_tokens\.weight, \.\.\.\); strip",
        ),
    ],
)
def test_names_that_nobody_knows(config: dict[str, Any], names: tuple[str, ...], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        naming_of(config, names, "it")
