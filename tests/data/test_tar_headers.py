"""Plain headers are read as `tarfile` reads them, and all others by it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from rae_scale.data.tar_headers import TarHeaders, plain_header

PLAIN = [("a.jpg", 700), ("b/c.txt", 0), ("d" * 99, 512), ("e" * 100, 1)]


def info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type = size, kind
    return made


def archive(members: Iterable[tarfile.TarInfo], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], tuple[list[tuple[object, ...]], int]]:
    """read(bytes) -> what is seen of each member, and where the last one ends."""

    def headers(data: bytes) -> tuple[list[tuple[object, ...]], int]:
        path = tmp_path / "a.tar"
        path.write_bytes(data)
        with open(path, "rb", buffering=0) as file:
            found = TarHeaders(file, len(data))
            seen = [(member.name, member.type, member.size, member.offset, member.offset_data) for member in found]
        return seen, found.end

    return headers


def as_tarfile(data: bytes) -> list[tuple[object, ...]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member.name, member.type, member.size, member.offset, member.offset_data) for member in tar]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "others",
    [
        [],
        [info("folder", kind=tarfile.DIRTYPE)],
        [info("f" * 60 + "/" + "g" * 90, 5)],
        [info("é.jpg", 5)],
        [info("old", 5, tarfile.AREGTYPE)],
        [info("link", kind=tarfile.SYMTYPE)],
    ],
    ids=["plain", "folder", "long", "unicode", "v7", "link"],
)
def test_members_are_those_of_tarfile(read, format: int, others: list[tarfile.TarInfo]) -> None:
    plain = [info(*member) for member in PLAIN]
    data = archive([*plain[:2], *others, *plain[2:]], format)
    seen, end = read(data)
    assert seen == as_tarfile(data)
    assert not any(data[end:])


def test_plain_members_do_without_tarfile(read, monkeypatch: pytest.MonkeyPatch) -> None:
    data = archive([info("folder", kind=tarfile.DIRTYPE), *(info(*member) for member in PLAIN)])
    monkeypatch.setattr(
        tarfile.TarInfo, "frombuf", classmethod(lambda cls, buf, *_: pytest.fail() if any(buf) else None)
    )
    with pytest.raises(AttributeError):  # what `tarfile` makes of None at the end mark
        read(data)


@pytest.mark.parametrize(
    ("place", "value"),
    [(156, b"g"), (148, b"777"), (124, b"\x80"), (124, b"9"), (345, b"p"), (257, b"x"), (0, b"\xff")],
)
def test_anything_odd_is_left_to_tarfile(place: int, value: bytes) -> None:
    block = bytearray(archive([info("a.jpg", 8)])[:512])
    assert plain_header(bytes(block)) is not None
    block[place : place + len(value)] = value
    if place != 148:
        checksum = sum(block) - sum(block[148:156]) + 256
        block[148:156] = b"%06o\0 " % checksum
    assert plain_header(bytes(block)) is None
    assert plain_header(b"") is None


def test_a_member_that_is_cut_off_is_reported_by_tarfile(read) -> None:
    data = archive([info("a.jpg", 700), info("b.jpg", 700)])
    with pytest.raises(tarfile.ReadError, match="unexpected end of data"):
        read(data[: 512 + 1024 + 512 + 600])
