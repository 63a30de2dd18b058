"""Several builders of one folder, and the merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rae_scale.data.build import BuildOptions, Part, build, merge
from rae_scale.data.build import folder as folder_module
from rae_scale.data.build.folder import PARTIAL_NAME
from rae_scale.data.build.locks import lock
from rae_scale.data.build.units import unit_name
from rae_scale.data.mds_reader import MDSReader
from tests.data.build.conftest import SHARD_BYTES, contents

OPTIONS = BuildOptions(shard_bytes=SHARD_BYTES)


def test_parts_and_a_merge_give_what_one_build_does(corpus, tmp_path: Path) -> None:
    inputs = corpus(5)
    straight = build(inputs, tmp_path / "straight", OPTIONS)
    for index in (2, 0, 1):
        report = build(inputs, tmp_path / "out", OPTIONS, part=Part(index, 3))
        assert not report.merged
        assert report.units == (2, 2, 1)[index]
    assert not (tmp_path / "out/index.json").exists()
    merged = merge(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert (merged.counts, merged.shards, merged.bytes) == (straight.counts, straight.shards, straight.bytes)
    assert len(MDSReader(tmp_path / "out")) == merged.counts.kept == 20


def test_a_merge_names_what_is_missing(corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(corpus(4), out, OPTIONS, part=Part(0, 2))
    with pytest.raises(ValueError, match=r"2 of 4 units are not there: 00001-in-1 \(missing\), 00003-in-3 \(missing\)"):
        merge(out)
    (out / "00000-in-0/shard.00000.mds").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"00000-in-0 \(shards are missing or cut\)"):
        merge(out)
    assert not (out / "index.json").exists()
    with pytest.raises(ValueError, match=r"nowhere/build\.json: no such file"):
        merge(tmp_path / "nowhere")


def test_a_merge_refuses_units_of_other_options(corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(corpus(2), out, OPTIONS)
    record = json.loads((out / "build.json").read_text())
    record["options"]["shard_bytes"] = 1
    (out / "build.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"00000-in-0 \(of other options\), 00001-in-1 \(of other options\)"):
        merge(out)


def test_the_list_of_rejections_is_of_all_units(corpus, tmp_path: Path) -> None:
    build(corpus(4), tmp_path / "out", OPTIONS)
    lines = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [(line["source"], line["key"]) for line in lines] == [("in-1.tar", "bad"), ("in-3.tar", "bad")]


def test_builders_that_share_a_folder_do_not_share_a_unit(corpus, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(folder_module.BuildFolder.make, "__kwdefaults__", {"patience_s": 0.0})
    out = tmp_path / "out"
    (out / PARTIAL_NAME).mkdir(parents=True)
    with lock(out / PARTIAL_NAME / "00001-in-1.lock"):
        with pytest.raises(ValueError, match="00001-in-1: another builder is writing it now"):
            build(corpus(2), out, OPTIONS, part=Part(1, 2))
        build(corpus(2), out, OPTIONS, part=Part(0, 2))
    build(corpus(2), out, OPTIONS, part=Part(1, 2))
    assert merge(out).units == 2


def test_what_another_builder_made_meanwhile_is_kept(tmp_path: Path) -> None:
    answers = iter([None, "theirs"])  # before the lock is held, and then
    made = folder_module.BuildFolder(tmp_path).make("unit", lambda: next(answers), lambda place: pytest.fail("again"))
    assert made == ("theirs", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [("3", "write it as i/N"), ("a/b", "write it as i/N"), ("-1/4", "write it as i/N"), ("4/4", "counted from 0"),
     ("0/0", "counted from 0")],
)  # fmt: skip
def test_parts_are_checked(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Part.parse(text)


def test_every_unit_is_in_one_part() -> None:
    units = list(range(10))
    parts = [Part.parse(f"{i}/4").of(units) for i in range(4)]  # type: ignore[arg-type]
    assert sorted(unit for part in parts for unit in part) == units
    assert parts[1] == [1, 5, 9]


def test_units_have_plain_names() -> None:
    names = {"cc12m-0012.tar": "00007-cc12m-0012", "a.v2.tar.gz": "00007-a.v2", "weird $(x) name.jsonl": None}
    assert unit_name(7, Path("/in/cc12m-0012.tar")) == names["cc12m-0012.tar"]
    assert unit_name(7, Path("b.v2.part.tar")) == "00007-b.v2"
    assert unit_name(7, Path("weird $(x) name.jsonl")) == "00007-weird___x__name"
    assert unit_name(7, Path("..tar")) == "00007-."
    assert len(unit_name(7, Path("x" * 300 + ".tar"))) == 106
