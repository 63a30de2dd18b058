from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rae_scale.data import build as build_module
from rae_scale.data.build import build
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.sources import Source


@pytest.fixture
def members(image) -> list[tuple[str, bytes]]:
    """Ten good samples of two layouts, and five that cannot be used."""
    good = []
    for i in range(5):
        good += [(f"{i}.jpg", image(seed=i)), (f"{i}.txt", f"caption {i}".encode())]
        good += [(f"r{i}.png", image("PNG", seed=i)), (f"r{i}.json", json.dumps({"text": f"line {i}"}).encode())]
    bad = [
        ("empty.jpg", image()),
        ("empty.txt", b" "),
        ("cut.jpg", image(width=64, height=64)[:-100]),
        ("cut.txt", b"a"),
        ("big.jpg", image(width=200, height=100)),
        ("big.txt", b"a"),
        ("zero.jpg", b""),
        ("zero.txt", b"a"),
        ("lonely.txt", b"a"),
    ]
    return bad[:4] + good + bad[4:]


def lines(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def test_totals_reconcile_and_every_rejection_is_listed(tar, members, tmp_path: Path) -> None:
    source = tar(members)
    report = build([source], tmp_path / "out", max_pixels=10_000)
    assert (report.read, report.written) == (15, 10)
    assert report.rejected == {"empty text": 1, "undecodable image": 2, "image too large": 1, "no image": 1}
    assert report.damaged == {}
    assert [(line["key"], line["reason"]) for line in lines(tmp_path / "out")] == [
        ("empty", "empty text"),
        ("cut", "undecodable image"),
        ("big", "image too large"),
        ("zero", "undecodable image"),
        ("lonely", "no image"),
    ]
    assert all(line["source"] == str(source) and line["detail"] for line in lines(tmp_path / "out"))


def test_samples_arrive_in_order_with_their_images_byte_for_byte(tar, members, tmp_path: Path) -> None:
    source = tar(members)
    report = build([source], tmp_path / "out", shard_bytes=3000, max_pixels=10_000)
    reader = MDSReader(tmp_path / "out")
    assert list(reader) == [
        item.sample for item in Source(source) if item.sample and item.key not in ("cut", "big", "zero")
    ]
    original = dict(members)
    assert [sample.image for sample in reader if sample.key == "3"] == [original["3.jpg"]]
    assert report.shards == len(reader.shards) > 1
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.mds"))


def test_several_inputs_become_one_folder(tar, image, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image())
    listed = tmp_path / "list.jsonl"
    listed.write_text(json.dumps({"image": "a.jpg", "caption": "from the list"}))
    inputs = [tar([("0.jpg", image()), ("0.txt", b"first")], "x.tar"), listed]
    assert build(inputs, tmp_path / "out").written == 2
    assert [sample.captions[0] for sample in MDSReader(tmp_path / "out")] == ["first", "from the list"]


def test_a_truncated_tar_keeps_its_complete_samples_and_is_reported(pack, image, tmp_path: Path) -> None:
    whole = pack(
        [(f"{i}.{kind}", image(seed=i) if kind == "jpg" else b"a") for i in range(4) for kind in ("jpg", "txt")]
    )
    source = tmp_path / "cut.tar"
    source.write_bytes(whole[: whole.index(b"3.jpg") + 700])
    report = build([source], tmp_path / "out")
    assert (report.written, report.rejected) == (3, {"truncated member": 1})
    assert list(report.damaged) == [str(source)]
    assert lines(tmp_path / "out")[-1]["reason"] == "damaged input"
    assert "unexpected end of data" in lines(tmp_path / "out")[-1]["detail"]


def test_verify_header_only_looks_at_the_size(tar, members, tmp_path: Path) -> None:
    report = build([tar(members)], tmp_path / "out", verify="header", max_pixels=10_000)
    assert report.rejected["undecodable image"] == 1  # the empty file; the cut one has a whole header
    assert report.rejected["image too large"] == 1


def test_nothing_usable_still_leaves_the_list_of_reasons(tar, tmp_path: Path) -> None:
    report = build([tar([("0.jpg", b"no image"), ("0.txt", b"a")])], tmp_path / "out")
    assert (report.written, report.read) == (0, 1)
    assert len(MDSReader(tmp_path / "out")) == 0
    assert lines(tmp_path / "out")[0]["reason"] == "undecodable image"


def test_a_folder_with_content_is_never_touched(tar, members, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    with pytest.raises(ValueError, match=r"out: exists and is not empty; choose another folder"):
        build([tar(members)], out)
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert not (tmp_path / "out.partial").exists()


def test_an_empty_folder_and_missing_parents_are_fine(tar, members, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for out in (tmp_path / "out", tmp_path / "x" / "y" / "out"):
        assert build([tar(members)], out).written > 0
        assert len(MDSReader(out)) > 0


def test_inputs_are_checked_before_anything_is_written(tar, members, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.tar"):
        build([tar(members), tmp_path / "gone.tar"], tmp_path / "out")
    with pytest.raises(ValueError, match="no inputs"):
        build([], tmp_path / "out")
    with pytest.raises(ValueError, match="verify='none'"):
        build([tar(members)], tmp_path / "out", verify="none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


def test_a_failed_build_leaves_nothing(tar, members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_module.MDSWriter, "_flush", full)
    with pytest.raises(OSError, match="No space left"):
        build([tar(members)], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


def test_a_killed_build_is_started_over_and_ends_the_same(tar, members, tmp_path: Path) -> None:
    source = tar(members)
    code = """
import os, signal, sys
from rae_scale.data import build
flush = build.MDSWriter._flush
def dying(self):
    flush(self)
    if len(self.shards) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
build.MDSWriter._flush = dying
build.build([sys.argv[1]], sys.argv[2], shard_bytes=3000)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.partial").glob("*.mds"))) == 2
    (tmp_path / "out.partial" / "shard.00099.mds").write_bytes(b"of a build with smaller shards")
    for name in ("out", "straight"):
        build([source], tmp_path / name, shard_bytes=3000)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "straight")]
    assert contents[0] == contents[1]
    assert not (tmp_path / "out.partial").exists()


def test_two_builds_of_one_folder_are_kept_apart(tar, members, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "shard.00000.mds").write_bytes(b"of the other build")
    other = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another build is writing it now"):
        build([tar(members)], tmp_path / "out")
    assert (tmp_path / "out.partial" / "shard.00000.mds").read_bytes() == b"of the other build"
    os.close(other)
