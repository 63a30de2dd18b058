"""Torch's distributed checkpoints, of one process and of FSDP2's shards."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import run_ranks
from torch.distributed.checkpoint.filesystem import _StorageInfo

from rae_scale.convert.convert import convert
from rae_scale.convert.dcp import open_dcp
from rae_scale.convert.open import open_source
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state import CheckpointError, read_weights
from tests.convert.dcp_folders import REFERENCE, STEP, write

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp")
    write(str(folder))
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp")
    run_ranks(write, 2, folder, args=(str(folder),))
    return folder


def check_everything(folder: Path, form: str) -> None:
    reference = torch.load(folder / REFERENCE, weights_only=True)
    with open_source(folder / form) as source:
        source.check()
        held = {(kind, name) for kind, forms in source.forms.items() for name in forms if kind != "ema"}
        assert held == reference.keys()
        for (kind, name), value in reference.items():
            assert torch.equal(source.read(kind, name, whole(value.shape)), value), (kind, name)
        weight = reference["weight", "dit.x_embed.weight"]
        assert torch.equal(source.read("weight", "dit.x_embed.weight", Box((2, 1), (6, 3))), weight[2:6, 1:3])
        assert (source.facts.step, source.facts.optimizer_step, source.naming) == (STEP, 1, "native")
        if form == "nested":
            assert torch.equal(source.read("ema", "dit.x_embed.weight", whole(weight.shape)), weight)


@pytest.mark.parametrize("form", ["nested", "flat"])
def test_of_one_process(form: str, alone: Path) -> None:
    check_everything(alone, form)


@pytest.mark.dist
@pytest.mark.parametrize("form", ["nested", "flat"])
def test_of_two_fsdp_ranks(form: str, sharded: Path) -> None:
    assert len(list((sharded / form).glob("*.distcp"))) == 2
    check_everything(sharded, form)


@pytest.mark.dist
def test_conversion(sharded: Path, tmp_path: Path) -> None:
    reference = torch.load(sharded / REFERENCE, weights_only=True)
    report = convert(sharded / "nested", tmp_path / "out", "native", weights="weight", verify=True)
    for name, tensor in read_weights(report.out).items():
        assert torch.equal(tensor, reference["weight", name])


def test_numbered_moments_are_not_taken(tmp_path: Path) -> None:
    weights = {"dit.x_embed.bias": torch.ones(3)}
    state = {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(2.0)}}}
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "out")
    assert open_dcp(tmp_path / "out").forms.keys() == {"weight"}


def test_nothing_of_a_model(tmp_path: Path) -> None:
    dcp.save({"loader": {"rows": torch.ones(3)}}, checkpoint_id=tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has no weights at the top level or under model.* but loader\.rows"):
        open_source(tmp_path / "out")


@pytest.fixture
def copied(alone: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(alone / "nested", tmp_path / "copied"))


Edit = Callable[[Any], Any]


def with_metadata(edit: Edit) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        edit(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return damage


def relocate(metadata: Any, **changes: Any) -> None:
    index, info = next((i, s) for i, s in metadata.storage_data.items() if i.fqn == "model.dit.x_embed.bias")
    metadata.storage_data[index] = _StorageInfo(**{**vars(info), **changes})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def chunks(metadata: Any) -> list[Any]:
    found: list[Any] = metadata.state_dict_metadata["model.dit.x_embed.weight"].chunks
    return found


class Evil:
    def __reduce__(self) -> Any:
        return eval, ("1 + 1",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: next(f.glob("*.distcp")).unlink(), r"__0_0\.distcp is missing"),
        (lambda f: truncate(next(f.glob("*.distcp"))), r"__0_0\.distcp is cut off"),
        (lambda f: truncate(f / ".metadata"), r"\.metadata is damaged: no valid pickle"),
        (
            lambda f: (f / ".metadata").write_bytes(pickle.dumps(Evil())),
            r"\.metadata: its pickle names .*builtins\.eval",
        ),
        (lambda f: (f / ".metadata").write_bytes(pickle.dumps({"a": 1})), r"not built as torch 2\.15 builds it"),
        (with_metadata(lambda m: chunks(m).clear()), r"x_embed\.weight \[7, 5\]: 0 elements are there"),
        (with_metadata(lambda m: chunks(m).append(chunks(m)[0])), r""),
        (with_metadata(lambda m: relocate(m, relative_path="../other.distcp")), r"outside the folder"),
        (with_metadata(lambda m: relocate(m, transform_descriptors=["zstd"])), r"stored through \['zstd'\]"),
        (with_metadata(lambda m: relocate(m, offset=1 << 40)), r"__0_0\.distcp is cut off"),
    ],
)
def test_damage(damage: Callable[[Path], Any], message: str, copied: Path) -> None:
    open_source(copied)
    damage(copied)
    if not message:  # the same chunk twice does no harm
        open_source(copied)
        return
    with pytest.raises(CheckpointError, match=message):
        open_source(copied)


def test_a_chunk_of_another_tensor(copied: Path) -> None:
    def swap(metadata: Any) -> None:
        by_name = {index.fqn: (index, info) for index, info in metadata.storage_data.items()}
        relocate(metadata, **vars(by_name["model.dit.x_embed.weight"][1]))

    with_metadata(swap)(copied)
    with pytest.raises(CheckpointError, match=r"should be a tensor \[7\] of torch\.float32"):
        open_source(copied).read("weight", "dit.x_embed.bias", Box((0,), (7,)))


def test_a_flipped_bit(copied: Path) -> None:
    source = open_dcp(copied)
    item = next(iter(source.tensors["weight"]["dit.x_embed.weight"].chunks.values()))
    data = bytearray(item.path.read_bytes())
    value = source.read("weight", "dit.x_embed.weight", Box((0, 0), (7, 5)))
    position = data.index(value.numpy().tobytes(), item.start)
    data[position] ^= 1
    item.path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged"):
        open_dcp(copied).check()
