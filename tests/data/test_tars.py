from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest

from rae_scale.data import tars
from rae_scale.data.record import BadSample
from rae_scale.data.tars import TarReader, split_name

PAIR = [("000.jpg", b"image 0"), ("000.txt", b"caption 0"), ("001.jpg", b"image 1"), ("001.txt", b"caption 1")]


def add_special(path: Path, *infos: tarfile.TarInfo) -> None:
    with tarfile.open(path, "a") as archive:
        for info in infos:
            archive.addfile(info)


def special(name: str, kind: bytes, target: str = "000.jpg") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def problems(path: Path) -> dict[str, str | None]:
    with TarReader(path) as reader:
        return {group.key: group.problem and group.problem.reason for group in reader.groups}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("000.jpg", ("000", "jpg")),
        ("a.b/000.image.JPG", ("a.b/000", "image.jpg")),
        ("000/image.jpg", ("000", "image.jpg")),
        ("000/synthetic_caption.txt", ("000", "synthetic_caption.txt")),
        ("image.jpg", ("image", "jpg")),
        ("README", None),
        ("._000.jpg", None),
        ("000.", None),
    ],
)
def test_member_names_split_at_the_first_dot_of_the_file_name(name: str, parts: tuple[str, str] | None) -> None:
    assert split_name(name) == parts


def test_members_are_grouped_by_key_and_read_in_any_order(tar) -> None:
    path = tar([PAIR[0], PAIR[2], PAIR[3], ("./000.txt", b"caption 0")])
    with TarReader(path) as reader:
        assert reader.damage is None
        assert [group.key for group in reader.groups] == ["000", "001"]
        first = reader.groups[0].members
        assert {suffix: reader.read(first[suffix]) for suffix in reversed(first)} == {
            "txt": b"caption 0",
            "jpg": b"image 0",
        }
        assert reader.find("001.txt") == reader.groups[1].members["txt"]
        assert reader.find("002.txt") is None


def test_links_devices_and_sparse_files_are_refused(tar) -> None:
    path = tar(PAIR)
    kinds = {
        "sym": tarfile.SYMTYPE,
        "hard": tarfile.LNKTYPE,
        "dev": tarfile.CHRTYPE,
        "fifo": tarfile.FIFOTYPE,
    }
    add_special(path, *(special(f"{key}.jpg", kind) for key, kind in kinds.items()))
    found = problems(path)
    assert {key: found[key] for key in kinds} == dict.fromkeys(kinds, "not a file")
    assert found["000"] is None


def test_directories_are_not_samples(tar) -> None:
    path = tar(PAIR)
    add_special(path, special("folder", tarfile.DIRTYPE))
    assert list(problems(path)) == ["000", "001"]


@pytest.mark.parametrize(
    "name", ["/etc/passwd.txt", "../up.txt", "a/../../up.txt", "a\tb.txt", "\udcff.txt", "x" * 600 + ".txt", "README"]
)
def test_bad_names_are_refused(tar, name: str) -> None:
    path = tar([*PAIR, (name, b"text")])
    assert list(problems(path).values()) == [None, None, "bad name"]


def test_a_key_that_comes_twice_keeps_its_first_sample(tar) -> None:
    path = tar([*PAIR, ("000.jpg", b"other"), ("000.txt", b"other caption")])
    with TarReader(path) as reader:
        assert [(group.key, group.problem and group.problem.reason) for group in reader.groups] == [
            ("000", None),
            ("001", None),
            ("000", "duplicate key"),
        ]
        assert reader.read(reader.groups[0].members["jpg"]) == b"image 0"
        for name, data in PAIR[:2]:
            member = reader.find(name)
            assert member is not None
            assert reader.read(member) == data


def test_a_member_above_the_limit_is_refused_without_being_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("big.jpg")
    info.size = 2**40  # a header is all there is of it
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with TarReader(path) as reader:
        assert reader.groups[0].problem is not None
        assert reader.groups[0].problem.reason == "member too large"
        assert reader.damage is not None


def test_the_number_of_members_is_limited(tar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MAX_MEMBERS", 3)
    with TarReader(tar(PAIR)) as reader:
        assert reader.damage is not None and "more than 3 members" in reader.damage
        assert [len(group.members) for group in reader.groups] == [2, 1]


def test_header_data_of_absurd_length_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 2**31
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with TarReader(path) as reader:
        assert reader.groups == []
        assert reader.damage is not None and "header data of 2147483648 bytes" in reader.damage


def test_every_truncation_keeps_what_is_complete_and_says_so(pack, tmp_path: Path) -> None:
    members = {f"{key}.{suffix}": key.encode() * 300 for key in "ab" for suffix in ("jpg", "txt")}
    data = pack(members.items())
    path = tmp_path / "cut.tar"
    for size in range(0, 4 * 1024 + 512, 50):
        path.write_bytes(data[:size])
        with TarReader(path) as reader:
            assert reader.damage, size
            found = {m.name: reader.read(m) for g in reader.groups if g.problem is None for m in g.members.values()}
            whole = sum(size >= start + 512 + 300 for start in range(0, 4 * 1024, 1024))
            cut = any(start + 512 <= size < start + 512 + 300 for start in range(0, 4 * 1024, 1024))
            # A cut member takes the whole sample with it: the second of two members takes the first.
            assert list(found.items()) == list(members.items())[: whole - whole % 2 * cut], size
            reasons = [group.problem.reason for group in reader.groups if group.problem]
            assert reasons == ["truncated member"] * cut


def test_joined_archives_do_not_lose_the_second_one_silently(pack, tmp_path: Path) -> None:
    path = tmp_path / "joined.tar"
    path.write_bytes(pack(PAIR[:2]) + pack(PAIR[2:]))
    with TarReader(path) as reader:
        assert len(reader.groups) == 1
        assert reader.damage is not None and "joined" in reader.damage


@pytest.mark.parametrize("data", [b"", b"<html>404</html>" * 100, b"\x1f\x8b" + bytes(2000)])
def test_a_file_that_is_no_tar_has_no_samples_and_says_why(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with TarReader(path) as reader:
        assert reader.groups == []
        assert reader.damage is not None and "not a tar" in reader.damage


def test_a_chain_of_long_name_headers_does_not_exhaust_the_stack(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 5
    path = tmp_path / "a.tar"
    path.write_bytes((info.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")) * 5000)
    with TarReader(path) as reader:
        assert reader.groups == []
        assert reader.damage


def test_a_header_that_points_backwards_ends_the_scan(tar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MAX_MEMBERS", 50)
    info = tarfile.TarInfo("loop.txt")
    info.size = -1024  # some tarfile versions go back by it, again and again
    path = tar(PAIR[:2])
    path.write_bytes(path.read_bytes()[:2048] + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with TarReader(path) as reader:
        assert [group.key for group in reader.groups] == ["000"]
        assert reader.damage is not None and "members" not in reader.damage


def test_malformed_pax_records_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("000.jpg")
        info.pax_headers = {"GNU.sparse.map": "x", "GNU.sparse.size": "y"}
        archive.addfile(info)
    with TarReader(path) as reader:
        assert reader.groups == []
        assert reader.damage


def test_flipped_bytes_never_crash(pack, tmp_path: Path) -> None:
    generator = random.Random(0)
    pax = io.BytesIO()
    with tarfile.open(fileobj=pax, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in PAIR:
            info = tarfile.TarInfo("long-" * 30 + name)
            info.size = len(data)
            info.pax_headers = {"comment": "ü", "GNU.sparse.name": "x"} if name == "001.jpg" else {}
            archive.addfile(info, io.BytesIO(data))
    path = tmp_path / "a.tar"
    for original in (pack(PAIR), pax.getvalue()):
        for _ in range(300):
            data = bytearray(original)
            for _ in range(generator.randint(1, 20)):
                data[generator.randrange(len(data))] = generator.randrange(256)
            path.write_bytes(data)
            with TarReader(path) as reader:
                for group in reader.groups:
                    for member in group.members.values() if group.problem is None else ():
                        reader.read(member)


def test_a_member_cut_off_after_the_scan_is_a_bad_sample(tar) -> None:
    path = tar(PAIR)
    with TarReader(path) as reader:
        with open(path, "r+b") as file:
            file.truncate(600)
        with pytest.raises(BadSample, match="truncated member"):
            reader.read(reader.groups[1].members["jpg"])
