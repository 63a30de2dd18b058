"""A build that leaves out duplicates, by one builder or several."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae_scale.data.build import BuildOptions, Part, Unit, build, merge
from rae_scale.data.mds_reader import MDSReader
from tests.data.build.conftest import contents

EXACT = BuildOptions(dedup="exact")


@pytest.fixture
def inputs(tar, image) -> list[Path]:
    """Pictures a and b; then b again, c without a caption and with one; then c and a again, and d."""

    def samples(*chosen: tuple[str, str, str]) -> list[tuple[str, bytes]]:
        return [
            member
            for key, picture, text in chosen
            for member in ((f"{key}.jpg", image(seed=ord(picture), width=64, height=64)), (f"{key}.txt", text.encode()))
        ]

    return [
        tar(samples(("0", "a", "a"), ("1", "b", "b")), "x.tar"),
        tar(samples(("2", "b", "b again"), ("3", "c", " "), ("4", "c", "c")), "y.tar"),
        tar(samples(("5", "c", "c again"), ("6", "a", "a again"), ("7", "d", "d")), "z.tar"),
    ]


def keys(folder: Path) -> list[str]:
    return [sample.key for sample in MDSReader(folder)]


def test_the_first_usable_one_is_kept(inputs, tmp_path: Path) -> None:
    report = build(inputs, tmp_path / "out", EXACT)
    assert keys(tmp_path / "out") == ["0", "1", "4", "7"]
    counts = report.counts
    assert (counts.read, counts.kept, counts.duplicates, counts.rejected) == (8, 4, 3, {"empty text": 1})
    lines = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"]) for line in lines] == [
        ("2", "duplicate"),
        ("3", "empty text"),
        ("5", "duplicate"),
        ("6", "duplicate"),
    ]
    assert [line["detail"] for line in lines if line["reason"] == "duplicate"] == [
        "of number 1 of 00000-x",
        "of number 2 of 00001-y",
        "of number 0 of 00000-x",
    ]
    assert build(inputs, tmp_path / "all").counts.kept == 7


def test_near_duplicates_too(tar, tmp_path: Path) -> None:
    blocks = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    members = []
    for quality in (90, 40):
        buffer = io.BytesIO()
        blocks.resize((96, 96), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
        members += [(f"{quality}.jpg", buffer.getvalue()), (f"{quality}.txt", b"a")]
    inputs = [tar(members)]
    assert build(inputs, tmp_path / "exact", EXACT).counts.kept == 2
    report = build(inputs, tmp_path / "near", BuildOptions(dedup="near", near_distance=8))
    assert (report.counts.kept, report.counts.duplicates) == (1, 1)
    assert "nearly number 0 of 00000-a" in (tmp_path / "near/rejected.jsonl").read_text()


def test_parts_first_scan_then_write(inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(inputs, tmp_path / "straight", EXACT)
    first = build(inputs, out, EXACT, part=Part(1, 2))
    assert (first.units, first.unscanned) == (0, ["00000-x", "00002-z"])
    assert not (out / "00001-y").exists()
    assert build(inputs, out, EXACT, part=Part(0, 2)).units == 2
    with pytest.raises(ValueError, match=r"1 of 3 units are not there: 00001-y \(missing\)"):
        merge(out)
    assert build(inputs, out, EXACT, part=Part(1, 2)).units == 1
    merge(out)
    assert contents(out) == contents(tmp_path / "straight")


def test_a_second_build_scans_and_writes_nothing(inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(inputs, out, EXACT)
    dates = {path: path.stat().st_mtime_ns for path in out.rglob("*.mds")} | {
        path: path.stat().st_mtime_ns for path in out.rglob("records.bin")
    }
    assert len(dates) == 6
    assert build(inputs, out, EXACT).written == 0
    assert all(path.stat().st_mtime_ns == date for path, date in dates.items())


def test_a_change_in_one_input_changes_what_others_leave_out(inputs, tar, image, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(inputs, out, EXACT)
    tar([("0.jpg", image(seed=7, width=64, height=64)), ("0.txt", b"neither a nor b")], "x.tar")
    report = build(inputs, out, EXACT)
    assert keys(out) == ["0", "2", "4", "6", "7"]
    assert report.written == 3
    build(inputs, tmp_path / "straight", EXACT)
    assert contents(out) == contents(tmp_path / "straight")


def test_an_input_that_changes_after_its_scan_is_refused(inputs, tar, image, tmp_path: Path) -> None:
    def change(unit: Unit) -> None:
        if unit.number == 2:
            tar([("0.jpg", image(seed=7)), ("0.txt", b"another")], "x.tar")

    with pytest.raises(ValueError, match=r"x\.tar: changed after it was looked through for duplicates; build again"):
        build(inputs, tmp_path / "out", EXACT, on_scan=change)
    assert build(inputs, tmp_path / "out", EXACT).merged


def test_a_merge_refuses_units_of_an_earlier_search(inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(inputs[:2], out, EXACT)
    third = Part(2, 3)
    build(inputs, out, EXACT, part=third)
    assert merge(out).counts.kept == 4  # a later input changes nothing before it
    manifest = json.loads((out / "00001-y/manifest.json").read_text())
    (out / "00001-y/manifest.json").write_text(json.dumps({**manifest, "duplicates": "of other fingerprints"}))
    with pytest.raises(ValueError, match=r"00001-y \(of an earlier search for duplicates\)"):
        merge(out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dedup": "all"}, "dedup='all': choose off, exact or near"),
        ({"dedup": "near"}, "near_distance=None: choose 0 to"),
        ({"dedup": "near", "near_distance": 99}, "near_distance=99: choose 0 to"),
        ({"near_distance": 3}, "changes nothing with dedup=off"),
    ],
)
def test_options_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BuildOptions(**settings)  # type: ignore[arg-type]
