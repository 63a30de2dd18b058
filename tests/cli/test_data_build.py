"""`rae-scale data build` and `data merge`: what the options do, and what is said."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from rae_scale.data.mds_reader import MDSReader

Rae = Callable[..., str]


def picture(width: int = 64, height: int = 48) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    """Two tars, the second with the picture of the first and a caption that is no text."""
    paths = []
    for name, members in {
        "a": [("0.jpg", picture()), ("0.txt", b"one")],
        "b": [("1.jpg", picture()), ("1.txt", b"two"), ("2.jpg", picture(80)), ("2.txt", b"\xff")],
    }.items():
        paths.append(tmp_path / f"{name}.tar")
        with tarfile.open(paths[-1], "w") as archive:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return paths


def test_a_line_for_each_unit_and_totals_that_add_up(rae: Rae, tars: list[Path], tmp_path: Path) -> None:
    command = ("data", "build", *tars, "--out", tmp_path / "out", "--workers", 1, "--dedup", "exact")
    said = rae(*command)
    assert "[1/2] 00000-a: looked through for duplicates" in said
    assert "[2/2] 00001-b: 0 kept, 1 rejected, 1 duplicates, 0.0 MiB" in said
    assert "3 in = 1 kept + 1 rejected + 1 duplicates" in said
    assert f"left out 2 of 3, each listed in {tmp_path / 'out/rejected.jsonl'}:" in said
    assert "1  invalid text" in said and "1  duplicate" in said
    assert "[1/2] 00000-a: 1 kept, 0 rejected, 0 duplicates, 0.0 MiB, there already" in rae(*command)


def test_parts_and_their_merge(rae: Rae, tars: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = rae("data", "build", *tars, "--out", out, "--units", "1/2")
    assert "[1/1] 00001-b: 1 kept, 1 rejected" in said
    assert f"each listed in {out}/*/rejected.jsonl" in said
    assert f"rae-scale data merge {out}" in said
    assert "1 of 2 units are not there: 00000-a (missing)" in rae("data", "merge", out, status=2)
    rae("data", "build", *tars, "--out", out, "--units", "0/2")
    assert "2 samples in 2 shards" in rae("data", "merge", out)
    assert len(MDSReader(out)) == 2


def test_parts_that_look_for_duplicates_say_that_a_second_run_is_needed(
    rae: Rae, tars: list[Path], tmp_path: Path
) -> None:
    said = rae("data", "build", *tars, "--out", tmp_path / "out", "--units", "0/2", "--dedup", "exact")
    assert "1 units of other parts are not yet (first: 00001-b); run the same command again" in said


def test_inputs_from_a_list(rae: Rae, tars: list[Path], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("b.tar\n\n")
    rae("data", "build", tars[0], "--list", tmp_path / "list.txt", "--out", tmp_path / "out", "--workers", 1)
    assert json.loads((tmp_path / "out/build.json").read_text())["inputs"] == ["a.tar", "b.tar"]


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--min-size", 49], 0),
        (["--max-aspect", 1.2], 0),
        (["--max-pixels", 100], 0),
        (["--max-caption-length", 2], 0),
        (["--verify", "header"], 1),
        (["--exif-transpose"], 1),
    ],
)
def test_what_is_refused(rae: Rae, tars: list[Path], tmp_path: Path, flags: list[object], kept: int) -> None:
    assert f"1 in = {kept} kept" in rae("data", "build", tars[0], "--out", tmp_path / "out", *flags)


def test_images_are_written_anew(rae: Rae, tars: list[Path], tmp_path: Path) -> None:
    flags = ("--resize", 24, "--reencode", "webp", "--quality", 30)
    rae("data", "build", tars[0], "--out", tmp_path / "out", *flags)
    image = Image.open(io.BytesIO(MDSReader(tmp_path / "out")[0].image or b""))
    assert (image.format, image.size) == ("WEBP", (32, 24))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quality", 90], "--quality has no effect on images that are not changed"),
        (["--near-distance", 3], "near_distance=3 changes nothing with dedup=off"),
        (["--units", "2/2"], "parts are counted from 0"),
        (["--adapter-option", "x"], "write it as NAME=VALUE"),
        (["--adapter", "nobody"], "adapter 'nobody' is not known"),
        (["--min-size", 0], "min_size=0"),
    ],
)
def test_options_are_checked(rae: Rae, tars: list[Path], tmp_path: Path, flags: list[object], message: str) -> None:
    assert message in rae("data", "build", tars[0], "--out", tmp_path / "out", *flags, status=2)
    assert not (tmp_path / "out").exists()


def test_options_of_an_adapter_reach_it(rae: Rae, tars: list[Path], tmp_path: Path) -> None:
    flags = ("--adapter", "auto", "--adapter-option", "nothing=1")
    assert "adapter 'auto' has no option 'nothing'" in rae(
        "data", "build", tars[0], "--out", tmp_path / "out", *flags, status=2
    )
