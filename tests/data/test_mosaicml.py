"""mosaicml-streaming reads what we write, and we read what it writes. One test: its import takes 5 seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rae_scale.data.mds_index import COMPRESSIONS
from rae_scale.data.mds_reader import BadShard, MDSReader
from rae_scale.data.read_options import ReadOptions
from rae_scale.data.record import Sample, Turn

SAMPLES = [
    Sample("a/0", b"\xff\xd8 pixels", ("a red circle", "ein Kreis 圆"), (), {"tag": "counting", "n": [1, 2.5, None]}),
    Sample("1", None, (), (Turn("human", "Hello"), Turn("gpt", "Hi ü"))),
    Sample("ü", b"png", ("x",), (Turn("human", "<image>\nWhat?"), Turn("gpt", "That."))),
]


def test_mosaicml_streaming_reads_ours_and_we_read_its(shards, image: Callable[..., bytes], tmp_path: Path) -> None:
    pytest.importorskip("streaming")
    samples = [*SAMPLES, *(Sample(str(i), image(seed=i), (f"caption {i}",)) for i in range(30))]
    folder = merged([shards(samples[:20], "unit-0"), shards(samples[20:], "unit-1")], tmp_path)
    assert list(MDSReader(folder)) == samples

    rows = rows_by_mosaicml(folder)
    assert [row["image"] for row in rows] == [sample.image or b"" for sample in samples]
    assert [row["key"] for row in rows] == [sample.key for sample in samples]
    assert [tuple(row["captions"]) for row in rows] == [sample.captions for sample in samples]
    assert rows[0]["metadata"] == samples[0].metadata
    assert rows[1]["turns"] == [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi ü"}]

    columns = {"captions": "json", "image": "bytes", "key": "str", "metadata": "json", "turns": "json"}
    options = ReadOptions(cache_dir=tmp_path / "cache")
    for number, (compression, hashes) in enumerate(
        [(None, ["sha256"]), (None, ["md5", "xxh64"]), (None, []), *((name, ["xxh3_64"]) for name in COMPRESSIONS)]
    ):
        out = tmp_path / f"theirs-{number}"
        write_by_mosaicml(out, columns, rows, compression=compression, hashes=hashes, size_limit=4000)
        written = sorted(out.iterdir())
        reader = MDSReader(out, options)
        assert list(reader) == samples, compression
        assert len(reader.sizes) > 1 and reader.fetches == (compression is not None)
        assert sorted(out.iterdir()) == written  # nothing is decompressed beside them
        shard = next(out.glob("shard.00000.mds*"))
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 0x10
        shard.write_bytes(data)
        if hashes:
            with pytest.raises(BadShard):
                MDSReader(out, ReadOptions(cache_dir=tmp_path / "other"))[0]

    # Columns as others name them, with one of fixed size and one that would run code if it were decoded.
    from PIL import Image

    picture = tmp_path / "p.jpg"
    picture.write_bytes(image())
    pixels = Image.open(picture)
    for encoding in ("jpeg", "png"):
        columns = {"image": encoding, "caption": "str", "score": "float32", "extra": "pkl", "flag": "int"}
        others = [
            {"image": pixels, "caption": f"c {number}", "score": 0.5, "extra": {1}, "flag": number}
            for number in range(3)
        ]
        write_by_mosaicml(tmp_path / encoding, columns, others)
        assert [sample.captions for sample in MDSReader(tmp_path / encoding)] == [("c 0",), ("c 1",), ("c 2",)]
    assert MDSReader(tmp_path / "jpeg")[1].image == picture.read_bytes()


def merged(units: list[Path], folder: Path) -> Path:
    entries = []
    for unit in units:
        for entry in json.loads((unit / "index.json").read_text())["shards"]:
            entry["raw_data"]["basename"] = f"{unit.name}/{entry['raw_data']['basename']}"
            entries.append(entry)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return folder


def rows_by_mosaicml(folder: Path) -> list[dict[str, Any]]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    dataset = StreamingDataset(local=str(folder), batch_size=1, shuffle=False, validate_hash="xxh3_128")
    rows = [dataset[index] for index in range(dataset.num_samples)]
    del dataset
    clean_stale_shared_memory()
    return rows


def write_by_mosaicml(out: Path, columns: dict[str, str], rows: list[dict[str, Any]], **options: Any) -> None:
    from streaming import MDSWriter

    with MDSWriter(columns=columns, out=str(out), **options) as writer:
        for row in rows:
            writer.write({name: row[name] for name in columns})
