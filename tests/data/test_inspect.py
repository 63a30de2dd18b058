from __future__ import annotations

import json
from pathlib import Path

import pytest

from rae_scale.data import inspect as inspect_module
from rae_scale.data.inspect import Preview, Spread, inspect
from rae_scale.data.record import Sample, Turn

TURNS = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]


def test_a_tar(tar, image) -> None:
    path = tar(
        [
            ("0.jpg", image(width=10, height=20)),
            ("0.txt", b"four"),
            ("1.png", image("PNG", width=30, height=40)),
            ("1.json", json.dumps({"text": "sixsix"}).encode()),
            ("2.json", json.dumps({"conversations": TURNS}).encode()),
            ("3.jpg", b""),
            ("3.txt", b"a"),
            ("4.txt", b"a"),
        ]
    )
    report = inspect(path)
    assert (report.kind, report.samples, report.examined, report.bytes) == ("tar", 5, 5, path.stat().st_size)
    assert report.layouts == {"image+txt": 1, "image+json": 1, "conversations": 1}
    assert report.rejected == {"undecodable image": 1, "no image": 1}
    assert report.image_formats == {"JPEG": 1, "PNG": 1}
    assert (report.text_only, report.conversations, report.captions) == (1, 1, 2)
    assert report.caption_length == Spread(4, 5, 6)
    assert (report.width, report.height) == (Spread(10, 20, 30), Spread(20, 30, 40))
    assert report.damage is None
    assert report.previews == [
        Preview("0", "four", "JPEG 10 x 20"),
        Preview("1", "sixsix", "PNG 30 x 40"),
        Preview("2", "human: Hello | gpt: Hi", "none"),
    ]


def test_a_damaged_tar(pack, tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes(pack([("0.jpg", bytes(3000))])[:1000])
    report = inspect(path)
    assert report.samples == 1
    assert report.damage


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"conversations": TURNS}) + "\n{\n")
    report = inspect(path)
    assert (report.kind, report.samples, report.layouts, report.rejected) == ("jsonl", 2, {"jsonl": 1}, {"bad json": 1})
    assert report.caption_length is report.width is None


def test_an_mds_folder(shards, image) -> None:
    turns = (Turn("human", "Hello"), Turn("gpt", "Hi"))
    path = shards([*(Sample(str(i), image(), ("abc",)) for i in range(8)), Sample("8", None, (), turns)])
    report = inspect(path)
    assert (report.kind, report.samples, report.examined) == ("mds", 9, 9)
    assert report.shards == len(list(path.glob("*.mds"))) > 1
    assert report.bytes == sum(file.stat().st_size for file in path.glob("*.mds"))
    assert report.layouts == {"captions": 8, "conversations": 1}
    assert (report.text_only, report.captions, report.conversations) == (1, 8, 1)
    assert len(report.previews) == 5


def test_a_large_folder_is_examined_evenly(shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_module, "MAX_EXAMINED", 4)
    report = inspect(shards(20))
    assert (report.samples, report.examined) == (20, 4)
    assert [preview.key for preview in report.previews] == ["mds-0", "mds-5", "mds-10", "mds-15"]


def test_an_empty_folder_of_shards(shards) -> None:
    report = inspect(shards([]))
    assert (report.samples, report.examined, report.caption_length) == (0, 0, None)


def test_other_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index\.json: no such file"):
        inspect(tmp_path)
