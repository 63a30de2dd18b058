"""Indexes that are broken or written to do harm are refused with their names; those of others are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rae_scale.data.mds_index import parse_index, shard_entries
from rae_scale.data.mds_reader import MDSReader


def entry(number: int = 0, **changes: Any) -> dict[str, Any]:
    raw = {"basename": f"unit/shard.{number:05}.mds", "bytes": 1000, "hashes": {"xxh64": f"{number:016x}"}}
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": ["xxh64"],
        "size_limit": 1000,
        "column_names": ["captions", "image"],
        "column_encodings": ["json", "bytes"],
        "column_sizes": [None, None],
        "raw_data": raw,
        "zip_data": None,
        "samples": 3,
        **changes,
    }


def raw(**changes: Any) -> dict[str, Any]:
    return {"raw_data": {**entry()["raw_data"], **changes}}


def index_of(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"shards": entries, "version": 2}).encode()


def test_a_merged_index_is_read_whole() -> None:
    zipped = {"basename": "b/shard.00000.mds.zstd", "bytes": 77, "hashes": {}}
    index = parse_index(index_of(entry(0), entry(1, samples=0), entry(2, compression="zstd:7", zip_data=zipped)), "x")
    assert index.samples.tolist() == [3, 0, 3] and index.samples.dtype == np.int64
    assert (index.bytes.tolist(), index.file_bytes.tolist()) == ([1000] * 3, [1000, 1000, 77])
    assert index.names == ["unit/shard.00000.mds", "unit/shard.00001.mds", "b/shard.00000.mds.zstd"]
    assert [index[number].digest for number in range(3)] == [f"{number:016x}" for number in range(3)]
    assert [index[number].format.compression for number in range(3)] == [None, None, "zstd"]
    assert {form.hash for form in index.formats} == {"xxh64"}
    assert len(parse_index(b' {"version": 2 , "shards": [ ] }\n', "x")) == 0


def test_the_fastest_hash_is_checked() -> None:
    hashes = {"sha256": "0" * 64, "of tomorrow": "?", "xxh64": "1" * 16}
    assert parse_index(index_of(entry(**raw(hashes=hashes))), "x")[0].digest == "1" * 16
    assert parse_index(index_of(entry(**raw(hashes={"of tomorrow": "?"}))), "x")[0].format.hash is None


def test_entries_are_decoded_one_after_the_other() -> None:
    entries = shard_entries('{"shards": [1, {"a": [2]}, "x", broken')
    assert [next(entries) for _ in range(3)] == [1, {"a": [2]}, "x"]
    with pytest.raises(json.JSONDecodeError):
        next(entries)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 2}',
        '{"shards": 3}',
        '{"shards": {}}',
        '{"shards": [{}]}',
        '{"shards": [3]}',
        '{"shards": []',
        '{"shards": [,]}',
        '{"shards": []} {}',
        '{"shards": [], "x"}',
        '{"shards": ' + "[" * 100_000,
        '{"x": ' + '{"a":' * 100_000,
        "\xff",
    ],
)
def test_what_is_no_index_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"^where: not a complete MDS index"):
        parse_index(text.encode("latin-1"), "where")


def test_a_cut_index_is_named_wherever_it_is_cut() -> None:
    data = index_of(entry(0), entry(1))
    for end in range(0, len(data), 7):
        with pytest.raises(ValueError, match=r"^where: "):
            parse_index(data[:end], "where")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "only MDS version 2 is read"),
        ({"format": "csv"}, "format 'csv'"),
        ({"compression": "lzma"}, "compression 'lzma'; br, bz2, gz, snappy, zstd are read"),
        ({"compression": "zstd"}, "not a complete MDS index"),  # without a compressed file
        ({"column_encodings": ["json", "pkl"]}, "column 'image' has encoding 'pkl'"),
        ({"column_names": ["a", "image"]}, "no text in columns"),
        ({"column_names": ["captions", 3]}, "column 3 of None bytes"),
        ({"column_sizes": [None, -1]}, "column 'image' of -1 bytes"),
        ({"column_sizes": [None]}, "unit/shard.00000.mds: "),
        ({"samples": -1}, "samples=-1 is not a whole number of 0 to"),
        ({"samples": 2**70}, "is not a whole number"),
        ({"samples": 3.0}, "is not a whole number"),
        ({"samples": True}, "is not a whole number"),
        ({"samples": 1000}, "bytes=1000 is not a whole number of 4008"),
        (raw(bytes=2**32), "bytes=4294967296 is not a whole number"),
        (raw(bytes="9"), "bytes='9' is not a whole number"),
        (raw(hashes={"xxh64": "xyz"}), "xxh64 'xyz' is no hash"),
        (raw(hashes=3), "not a complete MDS index"),
        *((raw(basename=name), "leaves the folder or is no name") for name in (
            "../x.mds", "a/../../x.mds", "/etc/passwd", "a//b", "a/./b", ".", "..", "", "a\\..\\b", "a\0b", "x" * 2000,
        )),
        (raw(basename=None), "not a complete MDS index"),
        ({"raw_data": None}, "not a complete MDS index"),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^where: ") as problem:
        parse_index(index_of(entry(**changes)), "where")
    assert message in str(problem.value)
    assert len(str(problem.value)) < 600


def test_a_shard_that_is_listed_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shard 'unit/shard\.00001\.mds' is listed twice"):
        parse_index(index_of(entry(1), entry(2), entry(1)), "where")


def test_a_shard_of_a_merged_index_lies_in_its_unit(shards, tmp_path: Path) -> None:
    folders = [shards(3, f"unit-{number}") for number in range(2)]
    entries = []
    for folder in folders:
        (found,) = json.loads((folder / "index.json").read_text())["shards"]
        found["raw_data"]["basename"] = f"{folder.name}/{found['raw_data']['basename']}"
        entries.append(found)
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    reader = MDSReader(tmp_path)
    assert [sample.key for sample in reader] == [f"unit-{unit}-{row}" for unit in range(2) for row in range(3)]
    assert reader.shard_name(1) == "unit-1/shard.00000.mds"
