"""Files of torch.save, read without loading them."""

from __future__ import annotations

import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rae_scale.convert import file_bytes
from rae_scale.convert.file_bytes import FileBytes
from rae_scale.convert.records import check_all
from rae_scale.convert.stored import StoredTensor
from rae_scale.convert.torch_zip import TorchFile
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state import CheckpointError

WEIGHT = torch.randn(6, 8, 10)
TENSORS: dict[str, Tensor] = {
    "whole": WEIGHT,
    "part": WEIGHT[1:4, 2:, ::2],
    "transposed": torch.randn(5, 7).t(),
    "parameter": nn.Parameter(torch.randn(3)),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "half": torch.randn(3, 4).half(),
    "bfloat16": torch.randn(3, 4).bfloat16(),
    "double": torch.randn(2).double(),
    "expanded": torch.randn(1, 4).expand(3, 4),
    "integers": torch.arange(5),
    "booleans": torch.tensor([True, False]),
    "row": torch.randn(1, 1, 6),
}


def open_torch(path: Path) -> TorchFile:
    return TorchFile(FileBytes(path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    torch.save({"model": TENSORS, "dtype": torch.float32, "shape": torch.Size([2]), "step": 3}, path)
    return path


def test_every_tensor(path: Path) -> None:
    content = open_torch(path).content
    assert content["shape"] == (2,) and content["step"] == 3
    for name, tensor in TENSORS.items():
        found: StoredTensor = content["model"][name]
        assert (found.shape, found.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(found.whole(), tensor) and found.whole().is_contiguous()


@pytest.mark.parametrize("name", ["whole", "part", "transposed", "expanded", "row"])
def test_every_box(name: str, path: Path) -> None:
    random.seed(0)
    tensor, stored = TENSORS[name], open_torch(path).content["model"][name]
    for _ in range(100):
        start = [random.randrange(length) for length in tensor.shape]
        stop = [random.randrange(first + 1, length + 1) for first, length in zip(start, tensor.shape, strict=True)]
        if random.random() < 0.5:
            start[-1], stop[-1] = 0, tensor.shape[-1]
        box = Box(tuple(start), tuple(stop))
        assert torch.equal(stored.read(box), tensor[box.slices])


def test_only_the_box_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = open_torch(path)
    sizes: list[int] = []
    real = FileBytes.read_into

    def counting(self: FileBytes, out: Tensor, position: int) -> None:
        sizes.append(out.nbytes)
        real(self, out, position)

    monkeypatch.setattr(FileBytes, "read_into", counting)
    file.content["model"]["whole"].read(Box((2, 0, 0), (4, 8, 10)))
    assert sizes == [2 * 8 * 10 * 4]


def test_tensors_with_attributes(tmp_path: Path) -> None:
    """Such as DeepSpeed leaves on them; torch saves them in another way."""
    tensor = torch.randn(3)
    tensor.tensor_model_parallel = True  # type: ignore[attr-defined]
    torch.save([tensor], tmp_path / "a.pt")
    assert b"_rebuild_from_type_v2" in (tmp_path / "a.pt").read_bytes()
    assert torch.equal(open_torch(tmp_path / "a.pt").content[0].whole(), tensor)


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_bytes, "MOST_OPEN", 2)
    files = []
    for number in range(5):
        torch.save(torch.tensor([number]), tmp_path / f"{number}.pt")
        files.append(open_torch(tmp_path / f"{number}.pt"))
    assert len(FileBytes.opened) == 2
    assert [int(file.content.whole()) for file in files] == list(range(5))
    check_all(record for file in files for record in file.all_records)


def test_a_file_within_a_file(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    (tmp_path / "outer").write_bytes(b"x" * 100 + data + b"y" * 100)
    inner = TorchFile(FileBytes(tmp_path / "outer", 100, len(data)))
    assert torch.equal(inner.content["model"]["part"].whole(), TENSORS["part"])
    check_all(inner.all_records)
    with pytest.raises(CheckpointError, match="is cut off"):
        FileBytes(tmp_path / "outer", 100, len(data) + 101)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_a_tensor(path: Path) -> None:
    flip(path, path.read_bytes().index(WEIGHT.numpy().tobytes()) + 1000)
    with pytest.raises(CheckpointError, match=r"model\.pt is damaged or cut off: data/\d+ is not what was written"):
        check_all(open_torch(path).all_records)


def rewrite(path: Path, edit: Callable[[dict[str, bytes]], Any], compression: int = zipfile.ZIP_STORED) -> None:
    """The same file with other members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit(members)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def with_pickle(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(members: dict[str, bytes]) -> None:
        members["model/data.pkl"] = edit(members["model/data.pkl"])

    return lambda path: rewrite(path, change)


def legacy(path: Path) -> None:
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (legacy, r"is no zip: torch wrote such files before 1\.6.*weights_only=True"),
        (lambda p: p.write_bytes(p.read_bytes()[:-30]), "is damaged or cut off"),
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "is damaged or cut off"),
        (lambda p: p.write_bytes(b""), "is no zip"),
        (lambda p: flip(p, p.read_bytes().index(b"dtype") + 2), r"data\.pkl is not what was written"),
        (lambda p: rewrite(p, lambda m: m.update({"model/byteorder": b"big"})), "has bytes in big-endian order"),
        (lambda p: rewrite(p, lambda m: None, zipfile.ZIP_DEFLATED), r"data\.pkl is compressed"),
        (lambda p: rewrite(p, lambda m: m.pop("model/data.pkl")), "not one of tensors that torch.save wrote"),
        (lambda p: rewrite(p, lambda m: m.update({"model/constants.pkl": b""})), "not one of tensors"),
        (lambda p: rewrite(p, lambda m: m.update({"other/data.pkl": b""})), "two members of one name"),
        (lambda p: rewrite(p, lambda m: m.pop("model/data/0")), r"data/0 has not the \d+ elements"),
        (lambda p: rewrite(p, lambda m: m.update({"model/data/0": b"abc"})), r"data/0 has not the 480 elements"),
        (with_pickle(lambda b: b.replace(b"K\x06K\x08K\n\x87", b"K\x07K\x08K\n\x87")), "is damaged: no valid pickle"),
        (with_pickle(lambda b: b.replace(b"FloatStorage", b"EvilStorage_"[:12])), "names torch.EvilStorage_"),
        (
            with_pickle(lambda b: b.replace(b"torch._utils\n_rebuild_tensor_v2", b"posix\nsystem")),
            r"names posix\.system",
        ),
        (with_pickle(lambda b: b[:-10]), "is damaged: no valid pickle"),
    ],
)
def test_damaged_and_hostile_files(damage: Callable[[Path], Any], message: str, path: Path) -> None:
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        open_torch(path)
    assert str(path) in str(error.value)


def test_a_record_that_the_local_header_moves(path: Path) -> None:
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("model/data/0").header_offset
    data[offset + 28 : offset + 30] = struct.pack("<H", 0xFFFF)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="data/0 is not where it should be"):
        open_torch(path)


def test_a_file_that_is_cut_off_later(path: Path) -> None:
    content = open_torch(path).content
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=r"model\.pt is cut off at byte \d+"):
        content["model"]["whole"].read(whole((6, 8, 10)))
