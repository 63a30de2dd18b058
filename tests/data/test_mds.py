from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from rae_scale.data import mds_reader
from rae_scale.data.mds_format import Column, decode_sample
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.mds_writer import MDSWriter
from rae_scale.data.record import BadSample, Sample, Turn

SAMPLES = [
    Sample("a/0", b"\xff\xd8 pixels", ("a red circle", "ein Kreis 圆"), (), {"tag": "counting", "n": [1, 2.5, None]}),
    Sample("1", None, (), (Turn("human", "Hello"), Turn("gpt", "Hi ü"))),
    Sample("ü", b"png", ("x",), (Turn("human", "<image>\nWhat?"), Turn("gpt", "That."))),
]


def edit_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0].update(changes)
    (folder / "index.json").write_text(json.dumps(index))


def test_what_is_written_is_read_back(shards) -> None:
    reader = MDSReader(shards(SAMPLES))
    assert len(reader) == 3
    assert list(reader) == SAMPLES


def test_shards_keep_below_the_limit_unless_one_sample_is_larger(shards) -> None:
    samples = [Sample(str(i), bytes(size), ("x",)) for i, size in enumerate([300, 300, 300, 5000, 300])]
    folder = shards(samples, shard_bytes=1200)
    reader = MDSReader(folder)
    assert [shard.samples for shard in reader.shards] == [2, 1, 1, 1]
    assert [shard.bytes <= 1200 for shard in reader.shards] == [True, True, False, True]
    assert list(reader) == samples
    assert [reader.locate(index) for index in range(5)] == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json",
        *(f"shard.{number:05}.mds" for number in range(4)),
    ]


def test_the_index_holds_the_hash_of_every_shard(shards) -> None:
    folder = shards(20)
    entries = json.loads((folder / "index.json").read_text())["shards"]
    assert len(entries) > 1
    for entry in entries:
        data = (folder / entry["raw_data"]["basename"]).read_bytes()
        assert entry["raw_data"]["bytes"] == len(data)
        assert entry["raw_data"]["hashes"] == {"xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def test_the_same_samples_give_the_same_bytes(shards) -> None:
    first, second = shards(9, "first"), shards(9, "second")
    samples = [MDSReader(folder)[3].captions for folder in (first, second)]
    assert samples[0] == samples[1]
    again = shards(list(MDSReader(first)), "again")
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


def test_a_folder_without_index_is_no_dataset(tmp_path: Path) -> None:
    writer = MDSWriter(tmp_path, 1000)
    writer.write(SAMPLES[0])
    with pytest.raises(ValueError, match=r"index\.json: no such file; give the folder"):
        MDSReader(tmp_path)


@pytest.mark.parametrize("shard_bytes", [0, -1, 2**32])
def test_impossible_shard_sizes_are_refused(tmp_path: Path, shard_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"shard_bytes={shard_bytes}"):
        MDSWriter(tmp_path, shard_bytes)


def test_a_missing_shard_is_named(shards) -> None:
    folder = shards(20)
    (folder / "shard.00001.mds").unlink()
    with pytest.raises(ValueError, match=r"shard\.00001\.mds: missing shard, .* copy it again"):
        MDSReader(folder)


def test_a_cut_shard_is_named(shards) -> None:
    folder = shards(20)
    path = folder / "shard.00001.mds"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"shard\.00001\.mds: {size - 1} bytes where the index says {size}; copy it"):
        MDSReader(folder)


@pytest.mark.parametrize("offset", [0, 4 * 21])
def test_a_bad_shard_header_is_named(shards, offset: int) -> None:
    folder = shards(20, shard_bytes=10**6)
    path = folder / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard\.00000\.mds: its header does not describe 20 samples"):
        MDSReader(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shards": 3}', '{"shards": [{}]}', '{"version": 2}'])
def test_a_broken_index_is_named(shards, text: str) -> None:
    folder = shards(1)
    (folder / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: not a complete MDS index"):
        MDSReader(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "only MDS version 2 is read"),
        ({"format": "csv"}, "format 'csv'"),
        ({"compression": "zstd"}, "compressed with 'zstd'; write the shards without compression"),
        ({"column_encodings": ["json", "pkl", "str", "json", "json"]}, "column 'image' has encoding 'pkl'"),
        ({"column_names": ["a", "image", "key", "metadata", "b"]}, "no text in columns"),
        ({"raw_data": {"basename": "../x.mds", "bytes": 1, "hashes": {}}}, "leaves the folder"),
    ],
)
def test_other_kinds_of_shards_are_refused(shards, changes: dict[str, object], message: str) -> None:
    folder = shards(1)
    edit_index(folder, **changes)
    with pytest.raises(ValueError, match=message):
        MDSReader(folder)


def test_corrupt_rows_are_bad_samples_not_crashes(shards) -> None:
    folder = shards(SAMPLES)
    path = folder / "shard.00000.mds"
    original = path.read_bytes()
    begin, end = struct.unpack_from("<2I", original, 4)
    refused = 0
    for position in [4, 5, 7, *range(begin, end)]:
        data = bytearray(original)
        data[position] ^= 0xFF
        path.write_bytes(data)
        try:
            MDSReader(folder)[0]
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
        MDSReader(folder)[0]


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
    assert len(reader.shards) > 5
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


def test_reading_and_writing_do_not_import_torch_or_streaming() -> None:
    code = (
        "import sys, rae_scale.data.build, rae_scale.data.inspect; "
        "print([m for m in ('torch', 'streaming', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_mosaicml_streaming_reads_ours_and_we_read_its(shards, image, tmp_path: Path) -> None:
    pytest.importorskip("streaming")
    from streaming import MDSWriter as MosaicWriter
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    samples = [*SAMPLES, *(Sample(str(i), image(seed=i), (f"caption {i}",)) for i in range(30))]
    folder = shards(samples, shard_bytes=4000)
    dataset = StreamingDataset(local=str(folder), batch_size=1, shuffle=False, validate_hash="xxh3_128")
    rows = [dataset[index] for index in range(dataset.num_samples)]
    del dataset
    clean_stale_shared_memory()
    assert [row["image"] for row in rows] == [sample.image or b"" for sample in samples]
    assert [row["key"] for row in rows] == [sample.key for sample in samples]
    assert [tuple(row["captions"]) for row in rows] == [sample.captions for sample in samples]
    assert rows[0]["metadata"] == samples[0].metadata
    assert rows[1]["turns"] == [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi ü"}]

    columns = {"captions": "json", "image": "bytes", "key": "str", "metadata": "json", "turns": "json"}
    with MosaicWriter(columns=columns, out=str(tmp_path / "same"), size_limit=4000) as writer:
        for row in rows:
            writer.write(row)
    assert list(MDSReader(tmp_path / "same")) == samples

    # Columns as others name them, with one of fixed size and one that would run code if it were decoded.
    columns = {"image": "jpeg", "caption": "str", "score": "float32", "extra": "pkl", "flag": "int"}
    from PIL import Image

    picture = tmp_path / "p.jpg"
    picture.write_bytes(image())
    with MosaicWriter(columns=columns, out=str(tmp_path / "other")) as writer:
        for number in range(3):
            row = {"image": Image.open(picture), "caption": f"c {number}", "score": 0.5, "extra": {1}, "flag": number}
            writer.write(row)
    assert [sample.captions for sample in MDSReader(tmp_path / "other")] == [("c 0",), ("c 1",), ("c 2",)]
    assert MDSReader(tmp_path / "other")[1].image == picture.read_bytes()
