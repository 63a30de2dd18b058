from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.mds_writer import MDSWriter
from rae_scale.data.record import Sample, Turn

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
    assert reader.sizes.tolist() == [2, 1, 1, 1]
    assert (reader.shard_bytes <= 1200).tolist() == [True, True, False, True]
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


def test_reading_and_writing_do_not_import_torch_or_streaming() -> None:
    code = (
        "import sys, rae_scale.data.mds_writer, rae_scale.data.mds_reader; "
        "print([m for m in ('torch', 'streaming', 'transformers', 'urllib3', 'boto3', 'google') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
