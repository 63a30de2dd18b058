"""Samples of local folders by index, whole, damaged and cut."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import pytest

from rae_scale.data import mds_reader
from rae_scale.data.mds_format import Column, decode_sample
from rae_scale.data.mds_reader import BadShard, MDSReader, source_fingerprint
from rae_scale.data.read_options import ReadOptions
from rae_scale.data.record import BadSample, Sample, Turn

UNHASHED = ReadOptions(check_hashes=False)
SAMPLES = [
    Sample("a/0", b"\xff\xd8 pixels", ("a red circle", "ein Kreis 圆"), (), {"tag": "counting", "n": [1, 2.5, None]}),
    Sample("1", None, (), (Turn("human", "Hello"), Turn("gpt", "Hi ü"))),
    Sample("ü", b"png", ("x",), (Turn("human", "<image>\nWhat?"), Turn("gpt", "That."))),
]


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:-1])
    elif how == "flipped bit":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        position = {"count": 0, "last offset": 4 * (1 + struct.unpack_from("<I", data)[0])}[how]
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ("missing", ReadOptions(), "the file is missing"),
        ("cut", ReadOptions(), r"\d+ bytes where the index says \d+"),
        ("flipped bit", ReadOptions(), r"xxh3_128 [0-9a-f]{32} where the index says [0-9a-f]{32}"),
        ("count", UNHASHED, r"its header does not describe \d+ samples"),
        ("last offset", UNHASHED, r"its header does not describe \d+ samples"),
    ],
)
def test_a_damaged_shard_is_a_bad_one_and_the_others_are_read(
    shards, how: str, options: ReadOptions, message: str
) -> None:
    folder = shards(20)
    before = {path.name for path in folder.iterdir()} - ({"shard.00001.mds"} if how == "missing" else set())
    damage(folder / "shard.00001.mds", how)
    reader = MDSReader(folder, options)
    first, second = int(reader.sizes[0]), int(reader.sizes[:2].sum())
    for index in (first, second - 1, first):
        with pytest.raises(BadShard, match=rf"bad shard: .*mds/shard\.00001\.mds: {message}"):
            reader[index]
    assert [reader[index].key for index in (0, first - 1, second)] == ["mds-0", f"mds-{first - 1}", f"mds-{second}"]
    assert {path.name for path in folder.iterdir()} == before  # a source is never touched
    stop = MDSReader(folder, ReadOptions(bad_shards="stop", check_hashes=options.check_hashes))
    assert stop[0].key == "mds-0"
    with pytest.raises(ValueError, match=rf"{message}.*set data\.bad_shards=quarantine") as problem:
        stop[first]
    assert not isinstance(problem.value, BadSample)


def test_a_folder_that_is_replaced_under_the_run_is_refused(shards) -> None:
    folder = shards(20)
    reader = MDSReader(folder)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    shards(20, shard_bytes=1000)
    with pytest.raises(ValueError, match=r"index\.json there has changed since this process read it"):
        reader[19]


def test_without_hashes_a_look_reads_no_whole_shard(shards) -> None:
    folder = shards(20)
    damage(folder / "shard.00000.mds", "flipped bit")
    assert MDSReader(folder, UNHASHED)[0].key == "mds-0"


def test_a_folder_is_not_in_the_cache(shards, tmp_path: Path) -> None:
    reader = MDSReader(shards(20), ReadOptions(cache_dir=tmp_path / "cache", cache_gb=1e-9))
    assert len(list(reader)) == 20
    reader.probe(0)
    assert not reader.fetches and not (tmp_path / "cache").exists()


def test_corrupt_rows_are_bad_samples_not_crashes(shards) -> None:
    folder = shards(SAMPLES)
    path = folder / "shard.00000.mds"
    original = path.read_bytes()
    begin, end = struct.unpack_from("<2I", original, 4)
    refused = 0
    for position in range(begin, end):
        data = bytearray(original)
        data[position] ^= 0xFF
        path.write_bytes(data)
        try:
            MDSReader(folder, UNHASHED)[0]
        except BadSample as problem:
            assert problem.reason == "corrupt row"
            assert "shard.00000.mds:0" in problem.detail
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(("good", "other"), [(b'["x"]', b'"xxx"'), (b'{"a": 1}', b"[11, 22]"), (b'["x"]', b'["x"}')])
def test_columns_of_another_kind_are_bad_samples(shards, good: bytes, other: bytes) -> None:
    folder = shards([Sample("k", b"p", ("x",), (), {"a": 1})])
    path = folder / "shard.00000.mds"
    path.write_bytes(path.read_bytes().replace(good, other))
    with pytest.raises(BadSample, match="corrupt row"):
        MDSReader(folder, UNHASHED)[0]


@pytest.mark.parametrize("length", [5, 7, 2**31])
def test_a_wrong_column_length_is_a_bad_sample(length: int) -> None:
    columns = (Column("caption", "str", None), Column("image", "bytes", None))
    row = struct.pack("<2I", 1, 6) + b"xpixels"
    assert decode_sample(row, columns, "k") == Sample("k", b"pixels", ("x",))
    with pytest.raises(BadSample, match="column sizes add up to"):
        decode_sample(struct.pack("<2I", 1, length) + row[8:], columns, "k")


def test_a_shard_cut_after_it_was_opened_is_a_bad_sample(shards) -> None:
    folder = shards(SAMPLES)
    reader = MDSReader(folder)
    assert reader[2] == SAMPLES[2]
    for size in (6, 500):
        with open(folder / "shard.00000.mds", "r+b") as file:
            file.truncate(size)
        with pytest.raises(BadSample, match="corrupt row"):
            reader[2]


def test_indices_outside_are_refused(shards) -> None:
    reader = MDSReader(shards(2))
    for index in (-1, 2):
        with pytest.raises(IndexError):
            reader[index]


def test_few_files_stay_open(shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mds_reader, "MAX_OPEN_FILES", 2)
    reader = MDSReader(shards(20, shard_bytes=1000))
    assert len(reader.sizes) > 5
    assert [reader[index].key for index in (*range(20), 0)] == [f"mds-{index}" for index in (*range(20), 0)]
    assert len(reader._files) == 2
    reader.close()
    assert len(reader._files) == 0


def test_a_reader_travels_to_another_process(shards) -> None:
    reader = MDSReader(shards(20))
    before = reader[7]
    assert pickle.loads(pickle.dumps(reader))[7] == before


def test_the_fingerprint_follows_the_content(shards) -> None:
    first, other = shards(9, "first"), shards(10, "other")
    copy = shards(list(MDSReader(first)), "copy")
    assert MDSReader(first).fingerprint == MDSReader(copy).fingerprint != MDSReader(other).fingerprint
    assert source_fingerprint(first) == MDSReader(first).fingerprint
