from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rae_scale.data.build import BuildOptions, build
from rae_scale.data.build.folder import LOCK_NAME, BuildFolder
from rae_scale.data.build.locks import lock
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.mds_writer import MDSWriter
from rae_scale.data.prepare import PrepareOptions
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


SMALL = PrepareOptions(max_pixels=10_000)
OPTIONS = BuildOptions(prepare=SMALL)


def lines(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def test_totals_reconcile_and_every_rejection_is_listed(tar, members, tmp_path: Path) -> None:
    source = tar(members)
    report = build([source], tmp_path / "out", OPTIONS)
    assert (report.counts.read, report.counts.kept, report.counts.duplicates) == (15, 10, 0)
    assert report.counts.rejected == {"empty text": 1, "undecodable image": 2, "image too large": 1, "no image": 1}
    assert report.damaged == {}
    assert [(line["key"], line["reason"]) for line in lines(tmp_path / "out")] == [
        ("empty", "empty text"),
        ("cut", "undecodable image"),
        ("big", "image too large"),
        ("zero", "undecodable image"),
        ("lonely", "no image"),
    ]
    assert all(line["source"] == "a.tar" and line["detail"] for line in lines(tmp_path / "out"))


def test_samples_arrive_in_order_with_their_images_byte_for_byte(tar, members, tmp_path: Path) -> None:
    source = tar(members)
    report = build([source], tmp_path / "out", BuildOptions(shard_bytes=3000, prepare=SMALL))
    reader = MDSReader(tmp_path / "out")
    assert list(reader) == [
        item.sample for item in Source(source) if item.sample and item.key not in ("cut", "big", "zero")
    ]
    original = dict(members)
    assert [sample.image for sample in reader if sample.key == "3"] == [original["3.jpg"]]
    assert report.shards == len(reader.sizes) > 1
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("00000-a/*.mds"))


def test_several_inputs_become_one_folder(tar, image, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image())
    listed = tmp_path / "list.jsonl"
    listed.write_text(json.dumps({"image": "a.jpg", "caption": "from the list"}))
    inputs = [tar([("0.jpg", image()), ("0.txt", b"first")], "x.tar"), listed]
    assert build(inputs, tmp_path / "out").counts.kept == 2
    assert [sample.captions[0] for sample in MDSReader(tmp_path / "out")] == ["first", "from the list"]


def test_a_truncated_tar_keeps_its_complete_samples_and_is_reported(pack, image, tmp_path: Path) -> None:
    whole = pack(
        [(f"{i}.{kind}", image(seed=i) if kind == "jpg" else b"a") for i in range(4) for kind in ("jpg", "txt")]
    )
    source = tmp_path / "cut.tar"
    source.write_bytes(whole[: whole.index(b"3.jpg") + 700])
    report = build([source], tmp_path / "out")
    assert (report.counts.kept, report.counts.rejected) == (3, {"truncated member": 1})
    assert list(report.damaged) == ["00000-cut"]
    assert lines(tmp_path / "out")[-1]["reason"] == "damaged input"
    assert "unexpected end of data" in lines(tmp_path / "out")[-1]["detail"]


def test_verify_header_only_looks_at_the_size(tar, members, tmp_path: Path) -> None:
    report = build(
        [tar(members)], tmp_path / "out", BuildOptions(prepare=PrepareOptions(verify="header", max_pixels=10_000))
    )
    assert report.counts.rejected["undecodable image"] == 1  # the empty file; the cut one has a whole header
    assert report.counts.rejected["image too large"] == 1


def test_nothing_usable_still_leaves_the_list_of_reasons(tar, tmp_path: Path) -> None:
    report = build([tar([("0.jpg", b"no image"), ("0.txt", b"a")])], tmp_path / "out")
    assert (report.counts.kept, report.counts.read) == (0, 1)
    assert len(MDSReader(tmp_path / "out")) == 0
    assert lines(tmp_path / "out")[0]["reason"] == "undecodable image"


def test_a_folder_with_content_is_never_touched(tar, members, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    with pytest.raises(ValueError, match=r"out: exists, is not empty and has no build.json; choose another folder"):
        build([tar(members)], out)
    assert [path.name for path in out.iterdir()] == ["precious"]
    with pytest.raises(ValueError, match="precious: is a file"):
        build([tar(members)], out / "precious")


def test_an_empty_folder_and_missing_parents_are_fine(tar, members, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for out in (tmp_path / "out", tmp_path / "x" / "y" / "out"):
        assert build([tar(members)], out).counts.kept > 0
        assert len(MDSReader(out)) > 0


def test_inputs_are_checked_before_anything_is_written(tar, members, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.tar"):
        build([tar(members), tmp_path / "gone.tar"], tmp_path / "out")
    with pytest.raises(ValueError, match="no inputs"):
        build([], tmp_path / "out")
    with pytest.raises(ValueError, match="engine='dask': choose local or ray"):
        build([tar(members)], tmp_path / "out", engine="dask")
    with pytest.raises(ValueError, match="workers=0"):
        build([tar(members)], tmp_path / "out", workers=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


def test_a_failed_unit_leaves_the_others_and_nothing_of_itself(corpus, tmp_path: Path, monkeypatch) -> None:
    write = MDSWriter._write_shard

    def full(self: MDSWriter, *rows: object) -> None:
        if "in-1" in self.folder.name:
            raise OSError(28, "No space left on device")
        write(self, *rows)

    monkeypatch.setattr(MDSWriter, "_write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        build(corpus(2), tmp_path / "out")
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.suffix != ".lock"}
    assert left == {".lock", ".partial", "build.json", "00000-in-0", *UNIT}


UNIT = {"manifest.json", "rejected.jsonl", "shard.00000.mds"}


def test_two_builds_of_one_folder_are_kept_apart(corpus, tmp_path: Path) -> None:
    inputs = corpus(1)
    build(inputs, tmp_path / "out")
    with lock(tmp_path / "out" / LOCK_NAME), pytest.raises(ValueError, match="another build is writing it now"):
        build(inputs, tmp_path / "out")
    one_part = BuildFolder(tmp_path / "out").builder(alone=False)
    another = BuildFolder(tmp_path / "out").builder(alone=False)
    with one_part, another, pytest.raises(ValueError, match="all need --units"):
        build(inputs, tmp_path / "out")


def test_everything_is_on_disk_before_a_unit_has_its_name(corpus, tmp_path: Path, monkeypatch) -> None:
    synced: set[int] = set()
    renamed: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def checked_rename(old: Path, new: Path) -> None:
        assert {path.name for path in old.iterdir()} == UNIT
        assert {path.stat().st_ino for path in (old, *old.iterdir())} <= synced
        synced.clear()
        rename(old, new)
        renamed.append(new.name)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", checked_rename)
    build(corpus(1), tmp_path / "out")
    assert renamed == ["00000-in-0"]
    assert (tmp_path / "out").stat().st_ino in synced
