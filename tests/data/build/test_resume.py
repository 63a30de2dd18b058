"""What a second build of a folder keeps, writes again, or refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from rae_scale.data.build import BuildOptions, build, merge
from rae_scale.data.prepare import PrepareOptions
from tests.data.build.conftest import SHARD_BYTES, contents

OPTIONS = BuildOptions(shard_bytes=SHARD_BYTES)


@pytest.fixture
def inputs(corpus) -> list[Path]:
    """Changed a minute ago: their dates are before those of what is built."""
    paths = corpus(3)
    for path in paths:
        date(path, -60)
    return paths


def date(path: Path, seconds: float, of: Path | None = None) -> None:
    """Set the date of change to so many seconds after that of `of`."""
    changed = (of or path).stat().st_mtime + seconds
    os.utime(path, (changed, changed))


def written(inputs: list[Path], out: Path, options: BuildOptions = OPTIONS, **settings: object) -> list[str]:
    """Build; the units that were not kept."""
    units: list[str] = []
    build(
        inputs, out, options, on_unit=lambda unit, done: units.append(unit.name) if done.written else None, **settings
    )
    return units


def test_a_manifest_says_what_became_of_its_input(inputs, tmp_path: Path) -> None:
    build(inputs, tmp_path / "out", OPTIONS)
    manifest = json.loads((tmp_path / "out/00001-in-1/manifest.json").read_text())
    assert manifest["input"]["name"] == "in-1.tar"
    assert manifest["input"]["bytes"] == inputs[1].stat().st_size
    assert manifest["counts"] == {"read": 5, "kept": 4, "rejected": {"undecodable image": 1}, "duplicates": 0}
    assert [shard["raw_data"]["basename"] for shard in manifest["shards"]] == ["shard.00000.mds", "shard.00001.mds"]
    assert not {"time", "host", "date"} & manifest.keys()


def test_what_is_there_is_kept(inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert written(inputs, out) == ["00000-in-0", "00001-in-1", "00002-in-2"]
    before = contents(out)
    assert written(inputs, out) == []
    assert contents(out) == before


@pytest.mark.parametrize("lost", ["manifest.json", "rejected.jsonl", "shard.00001.mds"])
def test_a_unit_that_is_not_whole_is_written_again(inputs, tmp_path: Path, lost: str) -> None:
    out = tmp_path / "out"
    build(inputs, out, OPTIONS)
    before = contents(out)
    (out / "00001-in-1" / lost).unlink()
    assert written(inputs, out) == ["00001-in-1"]
    assert contents(out) == before


def test_a_changed_input_is_written_again(inputs, tar, image, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(inputs, out, OPTIONS)
    tar([("new.jpg", image()), ("new.txt", b"a new caption")], "in-1.tar")
    assert written(inputs, out) == ["00001-in-1"]
    build(inputs, tmp_path / "straight", OPTIONS)
    assert contents(out) == contents(tmp_path / "straight")


def test_the_hash_decides_when_the_date_does_not(inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(inputs, out, OPTIONS)
    manifest = out / "00001-in-1/manifest.json"
    date(inputs[1], 10, of=manifest)  # touched, the same bytes
    assert written(inputs, out) == []
    assert manifest.stat().st_mtime > inputs[1].stat().st_mtime - 20
    data = bytearray(inputs[1].read_bytes())
    data[data.index(b"caption 10")] = ord("C")
    inputs[1].write_bytes(data)
    date(inputs[1], -100, of=manifest)  # other bytes of the same size, with an old date
    assert written(inputs, out) == []
    assert written(inputs, out, always_hash=True) == ["00001-in-1"]
    data[data.index(b"Caption 10")] = ord("K")
    inputs[1].write_bytes(data)
    date(inputs[1], 10, of=manifest)  # the same with a new one
    assert written(inputs, out) == ["00001-in-1"]


def test_other_options_are_refused_by_name(inputs, tmp_path: Path) -> None:
    build(inputs, tmp_path / "out", OPTIONS)
    before = contents(tmp_path / "out")
    other = BuildOptions(shard_bytes=SHARD_BYTES, prepare=PrepareOptions(verify="header", min_size=9))
    with pytest.raises(ValueError, match=r"prepare.min_size: 1 there, 9 now; prepare.verify: 'decode' there, 'header'"):
        build(inputs, tmp_path / "out", other)
    assert contents(tmp_path / "out") == before


def test_other_files_of_an_adapter_are_recorded_by_their_hash(tmp_path: Path) -> None:
    captions = tmp_path / "captions.jsonl"
    recorded = []
    for text in ("one", "two"):
        captions.write_text(json.dumps({"key": "0", "caption": text}))
        options = BuildOptions(adapter="cc12m-llavanext", adapter_options={"captions": str(captions)})
        recorded.append(options.recorded())
    assert {name for name in recorded[0] if recorded[0][name] != recorded[1][name]} == {"side_files.captions.jsonl"}


def test_inputs_may_be_added_but_not_changed(inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(inputs[:2], out, OPTIONS)
    with pytest.raises(ValueError, match=r"other inputs \(number 0: in-0.tar there, in-1.tar now\)"):
        build(inputs[1:], out, OPTIONS)
    with pytest.raises(ValueError, match=r"begun with 2 inputs, 1 are given now \(in-1.tar is the first"):
        build(inputs[:1], out, OPTIONS)
    assert written(inputs, out) == ["00002-in-2"]
    build(inputs, tmp_path / "straight", OPTIONS)
    assert contents(out) == contents(tmp_path / "straight")


def test_inputs_may_move(inputs, tmp_path: Path) -> None:
    build(inputs, tmp_path / "out", OPTIONS)
    (tmp_path / "elsewhere").mkdir()
    moved = [Path(shutil.move(path, tmp_path / "elsewhere")) for path in inputs]
    assert written(moved, tmp_path / "out") == []


def test_an_input_that_is_written_to_meanwhile_is_refused(inputs, tmp_path: Path, monkeypatch) -> None:
    usable = BuildOptions.usable

    def slow(self: BuildOptions, item: object) -> object:
        date(inputs[0], 5)
        return usable(self, item)

    monkeypatch.setattr(BuildOptions, "usable", slow)
    with pytest.raises(ValueError, match=r"in-0\.tar: changed while it was read"):
        build(inputs, tmp_path / "out", OPTIONS)
    assert not list((tmp_path / "out").glob("0*"))


def test_an_index_does_not_outlive_its_shards(inputs, tar, image, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    build(inputs, out, OPTIONS)
    tar([("new.jpg", image()), ("new.txt", b"a new caption")], "in-0.tar")
    monkeypatch.setattr(BuildOptions, "usable", lambda self, item: pytest.fail("as if killed"))
    with pytest.raises(pytest.fail.Exception):
        build(inputs, out, OPTIONS)
    assert not (out / "index.json").exists()


def test_totals_that_do_not_reconcile_are_refused(inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(inputs, out, OPTIONS)
    path = out / "00001-in-1/manifest.json"
    manifest = json.loads(path.read_text())
    for count, message in (("read", "6 samples came in, but 4 kept"), ("kept", "its shards hold 4")):
        counts = {**manifest["counts"], count: manifest["counts"][count] + 1}
        counts["rejected"] = (
            {"undecodable image": counts["read"] - counts["kept"]} if count == "kept" else counts["rejected"]
        )
        path.write_text(json.dumps({**manifest, "counts": counts}))
        with pytest.raises(ValueError, match=message):
            merge(out)
