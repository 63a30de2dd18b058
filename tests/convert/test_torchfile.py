"""Files that torch.load reads, written a part at a time."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

import pytest
import torch
from torch import Tensor

from rae_scale.convert import torchfile
from rae_scale.convert.torchfile import write_torch
from rae_scale.state.tensorfile import TensorToWrite

STATE = {
    "a.weight": torch.randn(3, 5, 1, 1),
    "b": torch.randn(7).bfloat16(),
    "scalar": torch.tensor(2.5),
    "none": torch.empty(0, 4),
    "half": torch.randn(2, 3).half(),
}


def to_write(name: str, tensor: Tensor) -> TensorToWrite:
    def fetch() -> Iterator[Tensor]:
        yield from tensor.reshape(-1).split(2)

    return TensorToWrite(name, tuple(tensor.shape), tensor.dtype, fetch)


class Pipe(io.FileIO):
    """A file that is written from beginning to end."""

    def seek(self, *_: int) -> int:
        raise OSError


def write(path: Path, tensors: Sequence[TensorToWrite], kind: type[io.FileIO] = Pipe) -> None:
    with kind(path, "w") as file:
        write_torch(cast(IO[bytes], file), tensors)


@pytest.mark.parametrize("kind", [io.FileIO, Pipe])
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("zip64_from", [1 << 31, 8])
def test_torch_reads_what_was_written(
    kind: type[io.FileIO], mmap: bool, zip64_from: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchfile, "ZIP64_FROM", zip64_from)
    path = tmp_path / "model.pt"
    write(path, [to_write(*item) for item in STATE.items()], kind)
    state = torch.load(path, weights_only=True, mmap=mmap)
    assert list(state) == list(STATE)
    for name, tensor in state.items():
        assert tensor.dtype == STATE[name].dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor, STATE[name])
    assert zipfile.ZipFile(path).testzip() is None


def test_data_lies_where_torch_lays_it(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    write(path, [to_write(*item) for item in STATE.items()])
    reader = torch._C.PyTorchFileReader(str(path))
    assert all(reader.get_record_offset(f"data/{number}") % 64 == 0 for number in range(len(STATE)))


def test_the_pickle_is_the_one_that_torch_writes(tmp_path: Path) -> None:
    def calls(path: Path) -> list[str]:
        import pickletools

        with zipfile.ZipFile(path) as archive:
            data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        return [f"{op.name} {argument}" for op, argument, _ in pickletools.genops(data)]

    write(tmp_path / "ours.pt", [to_write(*item) for item in STATE.items()])
    torch.save(STATE, tmp_path / "theirs.pt")
    assert calls(tmp_path / "ours.pt") == calls(tmp_path / "theirs.pt")


def test_a_source_that_ends_early_is_no_file(tmp_path: Path) -> None:
    short = TensorToWrite("a", (4,), torch.float32, lambda: [torch.zeros(3)])
    with pytest.raises(AssertionError, match="a: 3 of 4 elements"):
        write(tmp_path / "model.pt", [short])
