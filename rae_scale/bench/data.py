"""The data path: batches per second by workers, beside a bare loop that decodes and resizes the same images."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from rae_scale.bench.chart import bars
from rae_scale.bench.harness import Base, Benchmark, Case, Measured, Overrides, check_relevant, run_benchmark
from rae_scale.bench.record import Measure, Record, config_sections, facts_of
from rae_scale.bench.session import Session
from rae_scale.bench.timing import seconds_of
from rae_scale.config import Config
from rae_scale.config.paths import resolve_paths
from rae_scale.data.build import build
from rae_scale.data.chat import ChatTokenizer
from rae_scale.data.collate import Batch
from rae_scale.data.decode import decode_image
from rae_scale.data.loader import Loader, build_loader, data_fingerprint, open_sources
from rae_scale.data.mixture import Mixture
from rae_scale.data.shapes.tars import write_tars
from rae_scale.data.shapes.world import WorldConfig
from rae_scale.data.transforms import resize_square
from rae_scale.models.zoo import dit_config
from rae_scale.train.batches import BatchMaker, ConversationBatches, ImageBatches
from rae_scale.train.parts import load_stage_tokenizer

CPU = torch.device("cpu")
SECTIONS = (
    "data.num_workers",
    "data.global_batch_size",
    "data.micro_batch_size",
    "data.max_seq_len",
    "data.max_pixels",
    "run.seed",
)
HEEDED = (*SECTIONS, "data.sources", "data.prompt_template", "model.llm.tokenizer", "model.llm.path", "model.name")
PREFETCHED = 2
"""Batches that a worker of PyTorch's loader has ready; what was ready before the clock started is read first."""

COLUMNS = {
    "setting": "{name}",
    "images/s": "{images_per_s:.0f}",
    "ms per batch": "{batch_ms:.2f}",
    "10 - 90 %": "{batch_low_ms:.2f} - {batch_high_ms:.2f}",
    "bare loop, images/s": "{bare_images_per_s:.0f}",
    "of the bare loop": "{of_bare:.2f}",
    "first batch ms": "{first_ms:.0f}",
    "index ms": "{index_ms:.2f}",
}


def make_shards(folder: Path, images: int, size: int) -> Path:
    """MDS shards of `images` captioned pictures of the shapes world, `size` pixels wide: always the same ones."""
    tars = write_tars(folder / "tars", images, config=WorldConfig(size=size))
    build(tars, folder / "shards", verify="header")
    return folder / "shards"


def bench_data(
    base: Base,
    session: Session,
    points: Sequence[Overrides] = ((),),
    *,
    image_size: int,
    repeats: int = 20,
    starts: int = 2,
    after_row: Callable[[Record], None] = lambda record: None,
) -> Record:
    """A row for each point, over `data.sources`. One process: what one rank's loader gives.

    image_size: pixels of a side, that images are resized to. starts: how often the loader is started, to see how long
    the first batch takes. With `model.llm.tokenizer` set, captions become conversations as in pretraining; without,
    batches are of images alone.

    Raises:
        ValueError: sources that cannot be read, or batch sizes that do not divide.
    """

    def cases_of(point: Overrides) -> list[Case]:
        config = resolve_paths(base.config(point))
        check_relevant("data", [*base.overrides, *point], HEEDED)
        batches = batches_of(config, image_size)
        settings = {
            # Not their paths: the same images elsewhere are the same.
            "sources": data_fingerprint(config.data.sources),
            "samples": sum(map(len, open_sources(config.data.sources))),
            "image_size": image_size,
            "text": text_of(batches),
            "config": config_sections(config, SECTIONS),
        }
        run = functools.partial(measure, config, batches, repeats, starts)
        return [Case(settings, facts_of(config, precision=None), run)]

    return run_benchmark(DATA, points, cases_of, session, after_row=after_row)


def batches_of(config: Config, image_size: int) -> BatchMaker:
    if config.model.llm.tokenizer is None and config.model.llm.path is None:
        return ImageBatches(image_size)
    tokens = dit_config(config.model).num_tokens
    chat = ChatTokenizer(load_stage_tokenizer(config), tokens, config.data.max_seq_len)
    return ConversationBatches(chat, config.data.prompt_template, image_size)


def text_of(batches: BatchMaker) -> dict[str, Any] | None:
    """What tokenising depends on; None where images are alone."""
    if not isinstance(batches, ConversationBatches):
        return None
    chat = batches.chat
    return {
        "vocabulary": len(chat.tokenizer),
        "image_tokens": chat.num_image_tokens,
        "template": batches.prompt_template,
    }


def measure(config: Config, batches: BatchMaker, repeats: int, starts: int) -> Measured:
    """A batch's time is that of several in a row, divided: workers hand theirs over in bursts."""
    index = seconds_of([lambda: open_sources(config.data.sources)], CPU, repeats=max(3, starts), warm_up=1)
    first, seconds, images = [], [], 0
    for _ in range(starts):
        started = time.perf_counter()
        with start_loader(config, batches) as loader:
            images = sum(len(batch) for batch in next(loader))
            first.append(time.perf_counter() - started)
            seconds += batch_times(loader, max(1, config.data.num_workers), -(-repeats // starts))
    bare = bare_loop(config, batches.image_size, images, repeats)
    measures = {
        "batch": Measure.of(seconds),
        "bare": Measure.of(bare),
        "first": Measure.of(first),
        "index": Measure.of(index),
    }
    rate, alone = images / measures["batch"].median, images / measures["bare"].median
    return Measured(measures, {"images_per_s": rate, "bare_images_per_s": alone, "of_bare": rate / alone})


def start_loader(config: Config, batches: BatchMaker) -> Loader[Batch]:
    return build_loader(
        config.data,
        seed=config.run.seed,
        image_size=batches.image_size,
        prepare=batches.prepare,
        collate=batches.collate,
        quarantine_path=os.devnull,
    )


def batch_times(loader: Loader[Batch], workers: int, repeats: int) -> list[float]:
    """Seconds per batch, of `repeats` runs of as many batches as the workers make at once."""
    for _ in range(PREFETCHED * workers):
        next(loader)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(workers):
            next(loader)
        seconds.append((time.perf_counter() - started) / workers)
    return seconds


def bare_loop(config: Config, image_size: int, images: int, repeats: int) -> list[float]:
    """Seconds to decode and resize as many images as a batch has, on one thread, from memory: those that the loader
    begins with. What the loader adds is reading, workers, preparing and stacking."""
    readers = open_sources(config.data.sources)
    sizes, weights = [len(reader) for reader in readers], [source.weight for source in config.data.sources]
    mixture = Mixture(sizes, weights, config.run.seed)
    places = [mixture.locate(position) for position in range(min(4096, images * repeats))]
    found = [readers[place.source][place.index].image for place in places]
    encoded = [image for image in found if image is not None]
    turns = cycle(encoded)

    def one_batch() -> None:
        for image in islice(turns, images):
            resize_square(decode_image(image, config.data.max_pixels), image_size)

    with one_thread():
        return seconds_of([one_batch], CPU, repeats=repeats, warm_up=1)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def notes(record: Record) -> list[str]:
    return [
        "The bare loop decodes and resizes the same images on one thread, from memory. First batch: from nothing to "
        "it, with the start of the workers. Index: opening the folders."
    ]


DATA = Benchmark("data", "Data path", COLUMNS, bars("batch", "bare"), notes=notes)
