"""`rae-scale data preview`: pictures with their captions, from a data set or exactly as a training step saw them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rae_scale.config.schema import DataConfig
from rae_scale.data.decode import DEFAULT_MAX_PIXELS, decode_image
from rae_scale.data.loader import build_micro_batches
from rae_scale.data.looking.examine import preview_text
from rae_scale.data.looking.open import LOOK, is_shards, shards_to_open
from rae_scale.data.looking.sampling import random_samples, random_shards, read_item
from rae_scale.data.looking.sheet import Tile
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.quarantine import BadRecord
from rae_scale.data.record import BadSample, DecodedSample, Sample
from rae_scale.data.sources import Item, Source


def tiles_of(path: str, count: int, seed: int) -> Iterator[Tile]:
    """`count` samples of a folder of shards, a URL of one, a tar or a JSON lines file, chosen by `seed`."""
    return folder_tiles(path, count, seed) if is_shards(path) else file_tiles(Source(path), count, seed)


def folder_tiles(path: str, count: int, seed: int) -> Iterator[Tile]:
    reader = MDSReader(path, LOOK)
    shards = random_shards(reader.sizes, shards_to_open(path), seed)
    for index in random_samples(reader.sizes, count, shards, seed):
        number, row = reader.locate(index)
        yield item_tile(read_item(reader, index), f"{index:,} = {reader.shard_name(number)}:{row}")


def file_tiles(items: Iterable[Item], count: int, seed: int) -> Iterator[Tile]:
    """In the order of the file, all of which is read."""
    generator = random.Random(seed)
    kept: list[tuple[int, Item]] = []
    for number, item in enumerate(items):
        if number < count:
            kept.append((number, item))
        elif (slot := generator.randrange(number + 1)) < count:
            kept[slot] = (number, item)
    for number, item in sorted(kept, key=lambda pair: pair[0]):
        yield item_tile(item, f"number {number:,}")


def item_tile(item: Item, where: str) -> Tile:
    sample = item.sample
    if sample is None:
        return Tile(None, [where, item.key], "", f"not usable: {item.problem}")
    pixels, problem = None, None
    if sample.image is not None:
        try:
            pixels = decode_image(sample.image, DEFAULT_MAX_PIXELS)
        except BadSample as error:
            problem = f"not usable: {error}"
    return Tile(pixels, [where, sample.key, *image_label(sample, pixels)], texts(sample), problem)


def image_label(sample: Sample, pixels: np.ndarray | None) -> list[str]:
    if sample.image is None:
        return ["no picture"]
    size = "" if pixels is None else f"{pixels.shape[1]} x {pixels.shape[0]}, "
    return [f"{size}{len(sample.image) / 1024:,.0f} KiB"]


def texts(sample: Sample) -> str:
    """The conversation, or all captions, numbered where there are several."""
    if sample.turns or len(sample.captions) < 2:
        return preview_text(sample)
    return " ".join(f"({number}) {caption}" for number, caption in enumerate(sample.captions, start=1))


@dataclass(frozen=True)
class Seen:
    """In place of a stage's own `prepare`: refuses what that refuses, and returns what it was given."""

    prepare: Callable[[DecodedSample], Any]

    def __call__(self, decoded: DecodedSample) -> DecodedSample:
        self.prepare(decoded)
        return decoded


def step_tiles(
    data: DataConfig,
    *,
    seed: int,
    image_size: int,
    prepare: Callable[[DecodedSample], Any],
    batch: int,
    count: int,
) -> Iterator[Tile]:
    """The first `count` samples of global batch number `batch` (0 is the first), as the ranks of a run get them:
    pixels after crop, resize and flip, and the caption that was drawn.

    What could not be used has a tile with the reason, followed by what was taken in its place. `prepare` is that of the
    run's stage. Raises ValueError for sources that cannot be read.
    """
    # One sample at a time, and nothing fetched ahead of it: neither changes which samples these are.
    alone = data.model_copy(update={"micro_batch_size": 1, "prefetch_blocks": 0})
    samples = build_micro_batches(alone, seed=seed, image_size=image_size, prepare=Seen(prepare), collate=list)
    for place in range(min(count, data.global_batch_size)):
        item = samples[batch * data.global_batch_size + place]
        for record in item.bad:
            yield bad_tile(record)
        if item.batch is not None:
            yield seen_tile(item.batch[0], replaced=bool(item.bad))


def bad_tile(record: BadRecord) -> Tile:
    where = f"{record.source}/{record.shard}, sample {record.index:,}"
    labels = [f"position {record.position:,}", where, record.key]
    return Tile(None, [label for label in labels if label], "", f"quarantined: {record.reason}: {record.detail}")


def seen_tile(seen: DecodedSample, replaced: bool) -> Tile:
    place = f"position {seen.sample_index:,}" + (", in its place" if replaced else "")
    return Tile(seen.pixels, [place, seen.sample_id], preview_text(seen.sample))
