"""Checksums that are made while a record is read, in whatever order."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest
import torch

from rae_scale.convert import records
from rae_scale.convert.file_bytes import FileBytes
from rae_scale.convert.records import Checksum, Record, check_all
from rae_scale.state import CheckpointError

DATA = random.Random(0).randbytes(1000)
START = 7  # of the record in its file


@pytest.mark.parametrize("seed", range(20))
def test_parts_in_any_order(seed: int) -> None:
    draw, checksum, known = random.Random(seed), Checksum(), set()
    for _ in range(draw.randrange(30)):
        start = draw.randrange(1000)
        stop = min(start + draw.randrange(1, 200), 1000)
        checksum.add(start, memoryview(DATA)[start:stop])
        known |= set(range(start, stop))
    gaps = list(checksum.gaps(0, 1000))
    assert {byte for gap in gaps for byte in range(*gap)} == set(range(1000)) - known
    for start, stop in gaps:
        checksum.add(start, memoryview(DATA)[start:stop])
    assert checksum.value == zlib.crc32(DATA)
    assert len(checksum.stretches) == 1


def test_what_comes_again_counts_once() -> None:
    checksum = Checksum()
    checksum.add(0, memoryview(DATA))
    checksum.add(100, memoryview(bytes(200)))
    assert checksum.value == zlib.crc32(DATA)


def test_nothing() -> None:
    assert Checksum().value == zlib.crc32(b"")


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setattr(records, "KEPT_BYTES", 64)
    (tmp_path / "file").write_bytes(bytes(START) + DATA + b"behind")
    return Record(FileBytes(tmp_path / "file"), "data/0", START, len(DATA), zlib.crc32(DATA))


def test_only_what_was_not_read_is_read_for_the_check(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    for start, stop in ((300, 500), (0, 100), (500, 1000)):
        out = torch.empty(stop - start, dtype=torch.uint8)
        record.read_into(out, start)
        assert bytes(out.numpy()) == DATA[start:stop]
    blocks, read = FileBytes.blocks, []

    def counted(file: FileBytes, start: int, stop: int) -> object:
        read.append((start - START, stop - START))
        return blocks(file, start, stop)

    monkeypatch.setattr(FileBytes, "blocks", counted)
    check_all([record])
    check_all([record])
    assert read == [(100, 300)]


@pytest.mark.parametrize("position", [0, 150, 999])
@pytest.mark.parametrize("first", [True, False])
def test_a_flipped_bit_whether_it_was_read_or_not(position: int, first: bool, record: Record) -> None:
    path = record.file.path
    data = bytearray(path.read_bytes())
    data[START + position] ^= 4
    path.write_bytes(data)
    if first:
        record.read_into(torch.empty(200, dtype=torch.uint8), 100)
    with pytest.raises(CheckpointError, match=r"file is damaged or cut off: data/0 is not what was written; fetch"):
        check_all([record])
