from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from rae_scale.data.build import Part
from rae_scale.data.looking.problems import Problem, Problems
from rae_scale.data.looking.verify import VerifyReport, verify
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.record import Sample
from tests.data.hostile_server import serve

SHARD = "00000-web-0/shard.00000.mds"
UNIT = "00000-web-0"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def places(report: VerifyReport) -> list[str]:
    return [problem.where for problem in report.problems.listed]


def only_problem(report: VerifyReport) -> Problem:
    assert len(report.problems) == len(report.problems.listed) == 1, report.problems.listed
    return report.problems.listed[0]


def test_an_intact_build(built: Path) -> None:
    report = verify(built, decode=True)
    assert not report.problems
    checked, units = report.checked, report.units
    assert (checked.shards, checked.samples, checked.images, checked.unhashed) == (3, 10, 10, 0)
    assert checked.bytes == sum(path.stat().st_size for path in built.glob("*/*.mds"))
    assert (units.units, units.counts.read, units.counts.kept) == (3, 14, 10)
    assert (units.counts.rejected, units.counts.duplicates) == ({"undecodable image": 2, "no image": 1}, 1)
    said = json.loads(json.dumps(report.as_json()))
    assert said["manifests"]["duplicates"] == 1
    assert said["manifests"]["rejected"] == {"undecodable image": 2, "no image": 1}
    assert said["problems"] == []


def test_a_flipped_bit_a_cut_and_a_missing_shard(built: Path) -> None:
    shards = sorted(built.glob("*/*.mds"))
    flip(shards[0], -3)
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    shards[2].unlink()
    report = verify(built)
    assert report.checked.samples == 0
    assert report.problems.counts == {"shard": 3}
    assert places(report) == [path.relative_to(built).as_posix() for path in shards]
    hashed, cut, missing = (problem.what for problem in report.problems.listed)
    assert "xxh3_128" in hashed
    assert cut.startswith(f"{shards[1].stat().st_size} bytes where the index says")
    assert "missing" in missing or "no such file" in missing
    assert all("remove 0000" in problem.fix for problem in report.problems.listed)


def test_rows_that_do_not_parse_are_each_named(shards, edit) -> None:
    folder = shards(5, shard_bytes=100_000)
    path = folder / "shard.00000.mds"
    second = int.from_bytes(path.read_bytes()[8:12], "little")
    flip(path, second)  # the length of its first column
    edit(folder / "index.json", lambda index: index["shards"][0]["raw_data"].update(hashes={}))
    report = verify(folder)
    assert only_problem(report).where == "shard.00000.mds:1"
    assert only_problem(report).kind == "corrupt row"
    assert (report.checked.samples, report.checked.unhashed) == (4, 1)


def test_an_image_that_does_not_decode(shards, image) -> None:
    folder = shards([Sample("0", image(), ("a",)), Sample("1", image()[:-200], ("b",)), Sample("2", None, ("c",))])
    assert not verify(folder).problems
    report = verify(folder, decode=True)
    assert only_problem(report).where == "shard.00000.mds:1"
    assert "--verify decode" in only_problem(report).fix
    assert (report.checked.samples, report.checked.images) == (3, 1)


def lose_rejected(folder: Path) -> None:
    path = folder / UNIT / "rejected.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])


def count_wrongly(folder: Path) -> None:
    path = folder / UNIT / "manifest.json"
    content = json.loads(path.read_bytes())
    content["counts"]["read"] += 1
    path.write_text(json.dumps(content))


def change_hash(folder: Path) -> None:
    """A shard that is another one than the manifest's, with an index that agrees with it."""
    flip(folder / SHARD, -3)
    index = json.loads((folder / "index.json").read_bytes())
    index["shards"][0]["raw_data"]["hashes"]["xxh3_128"] = xxhash.xxh3_128_hexdigest((folder / SHARD).read_bytes())
    (folder / "index.json").write_text(json.dumps(index))


def lose_entry(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_bytes())
    del index["shards"][0]
    (folder / "index.json").write_text(json.dumps(index))


def leave_a_shard(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder / UNIT / "shard.00007.mds")


def add_unit(folder: Path) -> None:
    shutil.copytree(folder / UNIT, folder / "00003-web-9")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lose_rejected, {f"{UNIT}/rejected.jsonl": "manifest counts 1"}),
        (lambda folder: (folder / UNIT / "rejected.jsonl").unlink(), {f"{UNIT}/rejected.jsonl": "missing"}),
        (count_wrongly, {f"{UNIT}/manifest.json": "11 samples came in"}),
        (lambda folder: (folder / UNIT / "manifest.json").unlink(), {f"{UNIT}/manifest.json": "missing"}),
        (change_hash, {SHARD: "index.json lists it"}),
        (lose_entry, {SHARD: "index.json does not"}),
        (leave_a_shard, {f"{UNIT}/shard.00007.mds": "does not list"}),
        (add_unit, {"00003-web-9": "7 samples that index.json does not list"}),
        (lambda folder: shutil.rmtree(folder / "00001-web-1"), {"00001-web-1/manifest.json": "missing"}),
    ],
)
def test_manifests_index_and_folder_have_to_agree(
    built: Path, damage: Callable[[Path], object], expected: dict[str, str]
) -> None:
    damage(built)
    problems = verify(built).problems.listed
    for where, what in expected.items():
        assert any(problem.where == where and what in problem.what for problem in problems)
    assert all("remove" in problem.fix or "again" in problem.fix for problem in problems)


def test_shards_of_others_have_no_manifests(built: Path) -> None:
    for path in [built / "build.json", *built.glob("*/manifest.json")]:
        path.unlink()
    report = verify(built)
    assert not report.problems
    assert (report.units.units, report.checked.samples) == (0, 10)


def test_a_damaged_record_of_the_build_is_named(built: Path) -> None:
    (built / "build.json").write_text("{}")
    with pytest.raises(ValueError, match=r"build\.json: not what a build records"):
        verify(built)


def test_parts_make_up_the_whole(built: Path) -> None:
    flip(built / SHARD, -3)
    lost = int(MDSReader(built).sizes[0])
    parts = [verify(built, part=Part(index, 2)) for index in range(2)]
    assert [part.checked.shards for part in parts] == [2, 1]
    assert sum(part.checked.samples for part in parts) == 10 - lost
    assert sum(part.units.units for part in parts) == 3
    assert [len(part.problems) for part in parts] == [1, 0]


def test_over_http_with_a_cache_of_its_own(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with serve(built.parent) as server:
        # Flipped when fetched, and flipped when fetched again: damaged where it lies. The others only once.
        server.faults["shard.00000.mds"] = ["flip", "flip", "flip"]
        report = verify(f"{server.url}/built", decode=True)
    assert only_problem(report).where == SHARD
    assert (report.checked.samples, report.units.counts.read) == (10 - MDSReader(built).sizes[0], 14)
    assert not list((tmp_path / "temporary").rglob("*.mds"))


@pytest.mark.long
def test_worker_processes_find_the_same(built: Path) -> None:
    flip(built / SHARD, -3)
    alone, together = verify(built), verify(built, workers=2)
    assert together.as_json() == alone.as_json()


def test_an_index_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index\.json: no such file"):
        verify(tmp_path)


def test_a_thousand_problems_are_counted_and_some_listed() -> None:
    problems, more = Problems(most=3), Problems(most=2)
    for number in range(1000):
        more.add(Problem("row", str(number), "bad", "fix"))
    problems.merge(more)
    problems.merge(more)
    assert (len(problems), [problem.where for problem in problems.listed]) == (2000, ["0", "1", "0"])
