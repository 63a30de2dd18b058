"""Writing a folder that can be interrupted anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rae_scale.convert import parts, stretches
from rae_scale.convert.torchfile import write_torch
from rae_scale.convert.writer import FolderWriter, TensorOut
from rae_scale.parallel.boxes import Box
from rae_scale.state import CheckpointError

PURPOSE = {"source": "here", "options": ["native", None]}
NAME = "model.safetensors"


class Interrupted(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 elements are read at a time, and the journal has a line for every other chunk."""
    monkeypatch.setattr(parts, "CHUNK_BYTES", 64)
    monkeypatch.setattr(stretches, "STRETCH_BYTES", 100)


def contents() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": 100 * torch.randn(40, 7, generator=generator),
        "vector": torch.randn(40, generator=generator),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0),
    }


class Reads:
    """Serves `contents`, counts, and ends the process at the `stop`-th read."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.count = stop, 0

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[TensorOut]:
        return [TensorOut(key, tuple(t.shape), dtype, partial(self.read, t)) for key, t in contents().items()]

    def read(self, tensor: Tensor, box: Box) -> Tensor:
        if self.count == self.stop:
            raise Interrupted
        self.count += 1
        return tensor[box.slices]


def write(out: Path, reads: Reads, dtype: torch.dtype = torch.float32, purpose: Any = PURPOSE) -> FolderWriter:
    with FolderWriter(out, purpose) as writer:
        digest = writer.write(NAME, reads.tensors(dtype), {"step": "3"})
        (writer.folder / "config.yaml").write_text("stage: x\n")
        writer.finish()
    assert digest == xxhash.xxh3_128_hexdigest((out / NAME).read_bytes())
    return writer


def interrupted(out: Path, stop: int, dtype: torch.dtype = torch.float32) -> None:
    with pytest.raises(Interrupted), FolderWriter(out, PURPOSE) as writer:
        writer.write(NAME, Reads(stop).tensors(dtype), {"step": "3"})
    assert not out.exists()


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    write(tmp_path / "out", Reads(), torch.bfloat16)
    found = load_file(tmp_path / "out" / NAME)
    expected = {name: tensor.bfloat16() for name, tensor in contents().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with safe_open(tmp_path / "out" / NAME, framework="pt") as file:
        assert file.metadata() == {"step": "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stop", range(0, 50, 6))
def test_an_interrupted_file_is_continued(stop: int, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", every := Reads(), torch.bfloat16)
    interrupted(tmp_path / "out", stop, torch.bfloat16)
    again = Reads()
    writer = write(tmp_path / "out", again, torch.bfloat16)
    assert (tmp_path / "out" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()
    # At most the last stretch was lost: 50 elements in bfloat16, which cuts of 16 in row-major order read in 12 boxes.
    assert every.count - stop <= again.count <= every.count - max(0, stop - 12)
    assert writer.casts == whole.casts, "the whole conversion is reported, not only its last part"
    assert writer.message.startswith("continuing")


@pytest.mark.parametrize("position", [3, 90, 400])
def test_what_is_not_as_noted_is_written_again(position: int, tmp_path: Path) -> None:
    write(tmp_path / "whole", Reads())
    interrupted(tmp_path / "out", 40)
    path = tmp_path / ".out.tmp" / NAME
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    write(tmp_path / "out", Reads())
    assert (tmp_path / "out" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()


def test_a_file_of_another_header_is_not_continued(tmp_path: Path) -> None:
    """As when the program was changed in between."""
    with pytest.raises(Interrupted), FolderWriter(tmp_path / "out", PURPOSE) as writer:
        writer.write(NAME, Reads(40).tensors(), {"step": "4"})
    write(tmp_path / "out", Reads())
    with safe_open(tmp_path / "out" / NAME, framework="pt") as file:
        assert file.metadata() == {"step": "3"}


def test_a_complete_file_is_kept_if_it_is_intact(tmp_path: Path) -> None:
    for damaged in (False, True):
        with pytest.raises(Interrupted), FolderWriter(tmp_path / "out", PURPOSE) as writer:
            writer.write(NAME, Reads().tensors(), {"step": "3"})
            raise Interrupted
        if damaged:
            path = tmp_path / ".out.tmp" / NAME
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        again = Reads()
        with pytest.raises(Interrupted), FolderWriter(tmp_path / "out", PURPOSE) as writer:
            writer.write(NAME, again.tensors(), {"step": "3"})
            raise Interrupted
        assert (again.count > 0) == damaged
    write(tmp_path / "whole", Reads())
    write(tmp_path / "out", Reads())
    assert (tmp_path / "out" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()


def test_what_was_noted_of_bytes_that_were_written_over_is_void(tmp_path: Path) -> None:
    write(tmp_path / "whole", Reads())
    interrupted(tmp_path / "out", 40)
    path = tmp_path / ".out.tmp" / NAME
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    interrupted(tmp_path / "out", 25)
    write(tmp_path / "out", Reads())
    assert (tmp_path / "out" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()


def test_a_line_cut_off_in_the_journal_is_no_line(tmp_path: Path) -> None:
    write(tmp_path / "whole", Reads())
    interrupted(tmp_path / "out", 30)
    journal = tmp_path / ".out.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-20])
    interrupted(tmp_path / "out", 20)
    assert all(json.loads(line) for line in journal.read_bytes().splitlines())
    write(tmp_path / "out", Reads())
    assert (tmp_path / "out" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()


@pytest.mark.parametrize("file", [NAME, "other.bin", "sub/left.txt"])
def test_leftovers_do_not_stay(file: str, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", 7)
    stray = tmp_path / ".out.tmp" / file
    stray.parent.mkdir(exist_ok=True)
    with stray.open("ab") as appended:
        appended.write(b"x" * 10_000)
    write(tmp_path / "out", Reads())
    assert {path.name for path in (tmp_path / "out").rglob("*")} == {NAME, "config.yaml"}
    load_file(tmp_path / "out" / NAME)


def test_another_conversion_begins_anew(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", 7)
    again = Reads()
    writer = write(tmp_path / "out", again, purpose={**PURPOSE, "source": "changed"})
    assert "its source changed: beginning anew" in writer.message
    write(tmp_path / "other", other := Reads())
    assert again.count == other.count


def test_nothing_is_overwritten_and_nobody_else_writes(tmp_path: Path) -> None:
    write(tmp_path / "out", Reads())
    with pytest.raises(CheckpointError, match="out exists; write into a new folder"):
        FolderWriter(tmp_path / "out", PURPOSE)
    with (
        FolderWriter(tmp_path / "second", PURPOSE),
        pytest.raises(CheckpointError, match=r"another process is writing there \(.*second"),
    ):
        FolderWriter(tmp_path / "second", PURPOSE)


def write_pt(out: Path, reads: Reads) -> FolderWriter:
    with FolderWriter(out, PURPOSE) as writer:
        digest = writer.write_as("model.pt", reads.tensors(torch.float16), write_torch)
        if reads.stop == AFTER:
            raise Interrupted
        writer.finish()
    assert digest == xxhash.xxh3_128_hexdigest((out / "model.pt").read_bytes())
    return writer


AFTER = 1000  # reads: all, and killed before the folder is complete


@pytest.mark.parametrize("stop", [0, 1, 4, 6, 9, AFTER])
def test_a_file_of_another_format_is_continued(stop: int, tmp_path: Path) -> None:
    whole = write_pt(tmp_path / "whole", every := Reads())
    with pytest.raises(Interrupted):
        write_pt(tmp_path / "out", Reads(stop))
    writer = write_pt(tmp_path / "out", again := Reads())
    assert (tmp_path / "out" / "model.pt").read_bytes() == (tmp_path / "whole" / "model.pt").read_bytes()
    # At most the last stretch was lost: 50 elements in float16.
    assert every.count - stop <= again.count + max(0, stop - every.count)
    assert again.count <= max(0, every.count - max(0, stop - 12))
    assert writer.casts == whole.casts
    found = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in contents().items())


def test_a_file_that_was_begun_in_another_way_is_refused_and_then_begun_anew(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), FolderWriter(tmp_path / "out", PURPOSE) as writer:
        writer.write_as("model.pt", list(reversed(Reads(20).tensors(torch.float16))), write_torch)
    with pytest.raises(CheckpointError, match=r"model\.pt was begun in another way"):
        write_pt(tmp_path / "out", Reads())
    assert not list(tmp_path.iterdir())


def test_the_errors_of_a_cast_are_the_largest(tmp_path: Path) -> None:
    casts = write(tmp_path / "out", Reads(), torch.bfloat16).casts
    errors = {name: (t.bfloat16().float() - t).abs().max() for name, t in contents().items() if t.numel()}
    relative = {name: error / contents()[name].abs().max() for name, error in errors.items()}
    for found, expected in ((casts.absolute, errors), (casts.relative, relative)):
        name = max(expected, key=lambda name: float(expected[name]))
        assert (found.tensor, found.error) == (name, pytest.approx(float(expected[name])))
    assert write(tmp_path / "same", Reads()).casts.absolute.tensor == ""


def test_a_number_too_large_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    values = torch.tensor([1.0, float("inf"), float("nan"), -7e4])
    big = TensorOut("big", (4,), torch.float16, lambda box: values[box.slices])
    with (
        pytest.raises(CheckpointError, match=r"big has an entry of 7e\+04, and torch\.float16 ends at 6\.55e\+04; use"),
        FolderWriter(tmp_path / "out", PURPOSE) as writer,
    ):
        writer.write(NAME, [big], {})
    assert not list(tmp_path.iterdir())


def test_infinities_and_nan_may_stay_what_they_are(tmp_path: Path) -> None:
    odd = torch.tensor([1.0, float("inf"), float("nan"), -0.0])
    with FolderWriter(tmp_path / "out", PURPOSE) as writer:
        writer.write(NAME, [TensorOut("odd", (4,), torch.float16, lambda box: odd[box.slices])], {})
        writer.finish()
    found = load_file(tmp_path / "out" / NAME)["odd"]
    assert torch.equal(found.view(torch.int16), odd.half().view(torch.int16))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[list[Any]]]]:
    folder = tmp_path_factory.mktemp("killed")
    program = Path(__file__).with_name("killed.py")
    done = subprocess.run([sys.executable, program, folder], capture_output=True, text=True, check=True)
    yield folder, json.loads(done.stdout)


def test_killed_anywhere_the_next_attempt_makes_the_same_folder(killed: tuple[Path, list[list[Any]]]) -> None:
    """The process is killed at one call after the other that makes something last."""
    folder, deaths = killed
    assert [status for _, status in deaths] == [-9] * len(deaths)
    assert len(deaths) > 2 * 10
    expected = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    for where, _ in deaths:
        out = folder / where / "out"
        if not out.exists():
            write_as_killed(out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected, where
        assert {path.name for path in out.parent.iterdir()} <= {"out", ".out.journal"}, where


def write_as_killed(out: Path) -> None:
    write(out, Reads(), torch.bfloat16)
