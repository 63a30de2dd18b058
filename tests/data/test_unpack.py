"""Compressed tars: what holds for plain ones, and what only they can do to a reader."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from rae_scale.data import tars, unpack
from rae_scale.data.sources import Source
from rae_scale.data.tars import TarReader

MEMBERS = [("0.jpg", b"pixels"), ("0.txt", b"a red circle"), ("1.jpg", os.urandom(3000)), ("1.txt", b"a blue square")]


@pytest.fixture
def packed(pack: Callable[..., bytes], tmp_path: Path) -> Callable[..., Path]:
    def write(data: bytes | None = None, name: str = "a.tar.gz") -> Path:
        path = tmp_path / name
        path.write_bytes(gzip.compress(pack(MEMBERS)) if data is None else data)
        return path

    return write


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "A.TAR.GZ"])
def test_a_compressed_tar_reads_like_the_plain_one(packed, tar, name: str) -> None:
    assert list(Source(packed(name=name))) == list(Source(tar(MEMBERS)))


def test_several_gzip_members_are_one_archive(packed, pack) -> None:
    data = pack(MEMBERS)
    source = Source(packed(gzip.compress(data[:1000]) + gzip.compress(data[1000:])))
    assert [item.key for item in source] == ["0", "1"]
    assert source.damage is None


def test_nothing_is_left_in_the_temporary_folder(packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(unpack.tempfile, "tempdir", str(temporary))
    with TarReader(packed()) as reader:
        assert len(reader.groups) == 2
        assert list(temporary.iterdir()) == [], "not even while it is read: a killed process cleans up nothing"


def test_every_truncation_keeps_what_is_complete_and_says_so(packed, pack) -> None:
    data = gzip.compress(pack(MEMBERS))
    for length in [*range(0, len(data) - 8, 97), len(data) - 8]:
        source = Source(packed(data[:length]))
        good = [item.key for item in source if item.sample]
        assert source.damage, length
        assert good in ([], ["0"], ["0", "1"])
    assert good == ["0", "1"], "only the checksum is missing"


def test_all_that_lies_before_the_cut_is_kept_however_well_it_packs(packed) -> None:
    data = bytes(range(256)) * 4000
    file, damage = unpack.unpack(packed(gzip.compress(data)[:-8]))
    with file:
        assert damage and "truncated" in damage
        file.seek(0)
        assert file.read() == data


def test_a_flipped_bit_is_damage(packed, pack) -> None:
    data = bytearray(gzip.compress(pack([*MEMBERS, ("2.jpg", os.urandom(2**20)), ("2.txt", b"x")])))
    data[-6] ^= 1  # of the checksum
    source = Source(packed(bytes(data)))
    assert [item.key for item in source if item.sample] == ["0", "1"]
    assert source.damage and "unpacked to its end" in source.damage


@pytest.mark.parametrize("data", [b"", b"no gzip", b"\x1f\x8b", b"\x1f\x8b\x08\x00" + bytes(20)])
def test_a_file_that_is_no_gzip_has_no_samples_and_says_why(packed, data: bytes) -> None:
    source = Source(packed(data))
    assert list(source) == []
    assert source.damage


def test_a_bomb_stops_early(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "RATIO_FREE_BYTES", 2**21)
    path = packed(gzip.compress(bytes(2**24)))
    file, damage = unpack.unpack(path)
    with file:
        assert damage and "200 times its size" in damage
        assert file.seek(0, os.SEEK_END) <= 2**22
    source = Source(path)
    assert list(source) == []
    assert source.damage == damage


def test_the_unpacked_size_is_limited(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "MAX_UNPACKED_BYTES", 2**20)
    path = packed(gzip.compress(os.urandom(2**16) * 40))
    _, damage = unpack.unpack(path)
    assert damage and "split the archive" in damage


def test_hostile_members_are_refused_in_compressed_tars_too(packed) -> None:
    kinds = {"sym": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "dev": tarfile.CHRTYPE, "fifo": tarfile.FIFOTYPE}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("../up.jpg", "/etc/passwd.txt", "a/../../b.jpg"):
            archive.addfile(tarfile.TarInfo(name))
        for key, kind in kinds.items():
            info = tarfile.TarInfo(f"{key}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    with TarReader(packed(buffer.getvalue())) as reader:
        reasons = [group.problem and group.problem.reason for group in reader.groups]
    assert reasons == ["bad name"] * 3 + ["not a file"] * 4


def test_a_header_that_claims_a_terabyte_reads_nothing(packed) -> None:
    info = tarfile.TarInfo("huge.jpg")
    info.size = 2**40
    with TarReader(packed(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240)))) as reader:
        (group,) = reader.groups
        assert group.problem is not None and group.problem.reason == "member too large"
    assert tars.MAX_MEMBER_BYTES < 2**40
