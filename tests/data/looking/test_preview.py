from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rae_scale.config.schema import DataConfig, SourceConfig
from rae_scale.data.decode import decode_image
from rae_scale.data.loader import build_loader
from rae_scale.data.looking.preview import file_tiles, step_tiles, tiles_of
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.record import BadSample, DecodedSample, Sample, Turn
from rae_scale.data.sources import Item


def keys(tiles) -> list[str]:
    return [tile.labels[1] for tile in tiles]


def test_a_folder_by_seed(shards) -> None:
    folder = str(shards(30))
    first = list(tiles_of(folder, 6, seed=1))
    assert len(set(keys(first))) == 6
    assert keys(tiles_of(folder, 6, seed=1)) == keys(first) == keys(tiles_of(folder, 9, seed=1))[:6]
    assert keys(tiles_of(folder, 6, seed=2)) != keys(first)
    assert len(list(tiles_of(folder, 100, seed=1))) == 30


def test_a_tile_has_the_picture_the_caption_and_the_place_of_one_sample(shards) -> None:
    folder = shards(20)
    reader = MDSReader(folder)
    for tile in tiles_of(str(folder), 5, seed=0):
        where, key, image = tile.labels
        index, name = where.split(" = ")
        sample = reader[int(index)]
        shard, row = reader.locate(int(index))
        assert (key, name, tile.text) == (sample.key, f"shard.{shard:05}.mds:{row}", sample.captions[0])
        assert np.array_equal(tile.pixels, decode_image(sample.image, 10**6))
        assert image.startswith("24 x 16, ")


def test_what_cannot_be_used_is_shown_as_such(shards, image) -> None:
    turns = (Turn("human", "Hello"), Turn("gpt", "Hi"))
    samples = [
        Sample("broken", b"no image", ("a",)),
        Sample("text", None, (), turns),
        Sample("two", image(), ("b", "c")),
    ]
    broken, text, several = sorted(tiles_of(str(shards(samples)), 3, seed=0), key=lambda tile: tile.labels[1])
    assert (broken.pixels, broken.text) == (None, "a")
    assert "undecodable image" in (broken.problem or "")
    assert (text.pixels, text.text, text.problem) == (None, "human: Hello | gpt: Hi", None)
    assert (several.text, several.problem) == ("(1) b (2) c", None)


def test_a_tar_by_seed_in_its_order(tar, image) -> None:
    path = str(tar([(f"{n}.{kind}", data) for n in range(9) for kind, data in (("jpg", image()), ("txt", b"a"))]))
    chosen = keys(tiles_of(path, 4, seed=1))
    assert chosen == sorted(chosen) == keys(tiles_of(path, 4, seed=1))
    assert len(set(chosen)) == 4
    assert keys(tiles_of(path, 4, seed=2)) != chosen
    (tile,) = tiles_of(str(tar([("0.txt", b"alone")], "b.tar")), 4, seed=0)
    assert "no image" in (tile.problem or "")


def test_every_sample_of_a_file_is_as_likely() -> None:
    items = [Item(str(number), problem=BadSample("no image", "")) for number in range(8)]
    chosen = Counter(key for seed in range(400) for key in keys(file_tiles(items, 2, seed)))
    assert all(60 < chosen[str(number)] < 140 for number in range(8))


def refuse_some(decoded: DecodedSample) -> DecodedSample:
    if decoded.sample.key.endswith("7"):
        raise BadSample("too long", f"{decoded.sample.key} has 1000 tokens")
    return decoded


@pytest.fixture
def data(shards, image) -> DataConfig:
    samples = [Sample(f"{n}", image(seed=n), (f"first {n}", f"second {n}")) for n in range(29)]
    samples[11] = Sample("broken", image()[:-200], ("x",))
    return DataConfig(
        sources=(SourceConfig(path=str(shards(samples))), SourceConfig(path=str(shards(20, "other")), weight=0.5)),
        global_batch_size=12,
        micro_batch_size=3,
        num_workers=0,
        max_bad_fraction=1.0,
        crop="random",
        flip=True,
        caption_choice="weighted",
    )


def test_a_step_is_what_the_loader_gives(data: DataConfig, tmp_path: Path) -> None:
    quarantine = tmp_path / "quarantine.jsonl"
    loader = build_loader(
        data, seed=5, image_size=16, prepare=refuse_some, collate=list, quarantine_path=quarantine, start_step=0
    )
    replaced = 0
    with loader:
        for batch in range(4):
            seen = [decoded for micro_batch in next(loader) for decoded in micro_batch]
            tiles = list(step_tiles(data, seed=5, image_size=16, prepare=refuse_some, batch=batch, count=12))
            used = [tile for tile in tiles if tile.problem is None]
            assert [tile.labels[1] for tile in used] == [decoded.sample_id for decoded in seen]
            assert [tile.text for tile in used] == [decoded.sample.captions[0] for decoded in seen]
            assert all(np.array_equal(tile.pixels, got.pixels) for tile, got in zip(used, seen, strict=True))
            bad = [tile for tile in tiles if tile.problem is not None]
            replaced += len(bad)
            assert sum("in its place" in tile.labels[0] for tile in used) == len({tile.labels[0] for tile in bad})
    assert replaced == len(quarantine.read_text().splitlines()) > 0


def test_a_quarantined_sample_is_followed_by_its_substitute(data: DataConfig) -> None:
    tiles = [
        tile
        for batch in range(4)
        for tile in step_tiles(data, seed=5, image_size=16, prepare=refuse_some, batch=batch, count=12)
    ]
    number = next(number for number, tile in enumerate(tiles) if tile.problem)
    bad, good = tiles[number : number + 2]
    assert bad.problem is not None
    assert bad.problem.startswith(("quarantined: too long: ", "quarantined: undecodable image: "))
    assert ".mds, sample " in bad.labels[1]
    if good.problem is None:
        assert good.labels[0] == f"{bad.labels[0]}, in its place"


def test_only_as_many_as_asked_for(data: DataConfig) -> None:
    tiles = step_tiles(data, seed=5, image_size=16, prepare=lambda decoded: decoded, batch=0, count=4)
    places = {tile.labels[0].split(",")[0] for tile in tiles}
    assert places == {f"position {position}" for position in range(4)}
