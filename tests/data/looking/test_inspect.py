from __future__ import annotations

import json
from pathlib import Path

import pytest

from rae_scale.data.looking import inspect as inspect_module
from rae_scale.data.looking.distribution import Distribution
from rae_scale.data.looking.examine import Preview
from rae_scale.data.looking.inspect import inspect
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.record import Sample, Turn
from tests.data.hostile_server import serve

TURNS = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]


def extremes(values: Distribution) -> tuple[float, float]:
    return values.least, values.most


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
    assert (report.kind, report.samples, report.found.items, report.bytes) == ("tar", 5, 5, path.stat().st_size)
    found = report.found
    assert found.layouts == {"image+txt": 1, "image+json": 1, "conversations": 1}
    assert found.rejected == {"undecodable image": 1, "no image": 1}
    assert found.formats == {"JPEG": 1, "PNG": 1}
    assert (found.text_only, found.conversations, found.captions, found.usable) == (1, 1, 2, 3)
    assert extremes(found.characters) == (4, 6)
    assert (extremes(found.width), extremes(found.height), extremes(found.aspect)) == ((10, 30), (20, 40), (0.5, 0.75))
    assert report.damage is None
    assert found.previews == [
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
    assert (report.kind, report.samples) == ("jsonl", 2)
    assert (report.found.layouts, report.found.rejected) == ({"jsonl": 1}, {"bad json": 1})
    assert len(report.found.characters) == len(report.found.width) == 0


def test_an_mds_folder(shards, image) -> None:
    turns = (Turn("human", "Hello"), Turn("gpt", "Hi"))
    path = shards([*(Sample(str(i), image(), ("abc",)) for i in range(8)), Sample("8", None, (), turns)])
    report = inspect(path)
    assert (report.kind, report.samples, report.found.items, report.units) == ("mds", 9, 9, None)
    assert report.shards == len(list(path.glob("*.mds"))) > 1
    assert report.bytes == sum(file.stat().st_size for file in path.glob("*.mds"))
    assert report.found.layouts == {"captions": 8, "conversations": 1}
    assert (report.found.text_only, report.found.captions, report.found.conversations) == (1, 8, 1)
    assert len(report.found.previews) == 5


def test_a_large_folder_is_examined_evenly(shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_module, "MAX_EXAMINED", 4)
    report = inspect(shards(20))
    assert (report.samples, report.found.items) == (20, 4)
    assert [preview.key for preview in report.found.previews] == ["mds-0", "mds-5", "mds-10", "mds-15"]


def test_an_empty_folder_of_shards(shards) -> None:
    report = inspect(shards([]))
    assert (report.samples, report.found.items, report.found.previews) == (0, 0, [])


def test_other_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index\.json: no such file"):
        inspect(tmp_path)


def test_what_the_manifests_of_a_build_count(built: Path) -> None:
    report = inspect(built)
    assert (report.kind, report.samples, report.shards) == ("mds", 10, 3)
    assert report.units is not None
    counts = report.units.counts
    assert (report.units.units, counts.read, counts.kept, counts.duplicates) == (3, 14, 10, 1)
    assert counts.rejected.total() == 3


def test_a_build_that_is_not_done(built: Path) -> None:
    (built / "index.json").unlink()
    (built / "00002-flux-0/manifest.json").write_text("not one of ours")
    (built / ".partial/00003").mkdir(parents=True)
    report = inspect(built)
    assert (report.kind, report.samples, report.inputs, report.shards) == ("partial build", 7, 3, 2)
    assert report.bytes == sum(path.stat().st_size for path in built.glob("00000*/*.mds"))
    assert report.units is not None
    assert (report.units.units, report.units.counts.read) == (2, 11)


def test_a_url_is_read_through_few_shards(built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("rae_scale.data.looking.open.REMOTE_SHARDS", 1)
    with serve(built.parent) as server:
        report = inspect(f"{server.url}/built")
        fetched = [request.path for request in server.requests if request.path.endswith(".mds")]
    assert (report.kind, report.samples, report.found.items) == ("mds", 10, MDSReader(built).sizes[0])
    assert fetched == ["/built/00000-web-0/shard.00000.mds"]
    assert report.units is not None
    assert report.units.counts.read == 14
