"""The data path in a race: whole, as a bare loop of decoding and resizing, and as two other libraries do it."""

from __future__ import annotations

import functools
import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rae_scale.bench.chart import bars
from rae_scale.bench.data_index import measure_index
from rae_scale.bench.data_pictures import repeated, write_shards, write_tars
from rae_scale.bench.data_race import PREFETCHED, ReaderFailed, Result, race
from rae_scale.bench.data_readers import BareLoop, Ours, Reader, Streaming, WebDataset
from rae_scale.bench.harness import Base, Benchmark, Case, Measured, Overrides, check_relevant, run_benchmark
from rae_scale.bench.record import Measure, Record, config_sections, facts_of
from rae_scale.bench.session import Session
from rae_scale.bench.timing import seconds_of
from rae_scale.config import Config
from rae_scale.config.paths import resolve_paths
from rae_scale.data.chat import ChatTokenizer
from rae_scale.data.loader import build_loader, data_fingerprint, open_sources
from rae_scale.data.record import BadSample, DecodedSample, Sample
from rae_scale.data.transforms import ImageTransform
from rae_scale.models.zoo import dit_config
from rae_scale.train.batches import BatchMaker, ConversationBatches, ImageBatches
from rae_scale.train.parts import load_stage_tokenizer

CPU = torch.device("cpu")
OURS, BARE = "rae-scale", "bare loop"
READERS = (OURS, BARE, "streaming", "webdataset")
PACKAGES = {"streaming": "mosaicml-streaming", "webdataset": "webdataset"}
COPIED = 4096
"""Most images that the other readers get a copy of."""
SECTIONS = (
    "data.num_workers",
    "data.global_batch_size",
    "data.micro_batch_size",
    "data.max_seq_len",
    "data.max_pixels",
    "data.crop",
    "data.flip",
    "data.scaled_decode",
    "data.caption_choice",
    "data.lanes",
    "data.shuffle_block",
    "data.prefetch_blocks",
    "run.seed",
)
HEEDED = (
    *SECTIONS,
    "data.sources",
    "data.cache_dir",
    "data.cache_gb",
    "data.prompt_template",
    "model.llm.tokenizer",
    "model.llm.path",
    "model.name",
)

COLUMNS = {
    "setting": "{name}",
    "images/s": "{images_per_s:.0f}",
    "ms per batch": "{batch_ms:.2f}",
    "10 - 90 %": "{batch_low_ms:.2f} - {batch_high_ms:.2f}",
    "images/s per core": "{images_per_core_s:.0f}",
    "CPU ms per image": "{cpu_ms:.2f}",
    "of the bare loop, per core": "{of_bare:.2f}",
    "rae-scale is faster by": "{slower:.2f}",
    "first batch ms": "{first_ms:.0f}",
    "index ms": "{index_ms:.2f}",
    "MB": "{megabytes:.0f}",
}


def bench_data(
    base: Base,
    session: Session,
    points: Sequence[Overrides] = ((),),
    *,
    image_size: int,
    repeats: int = 20,
    starts: int = 2,
    only: Sequence[str] = READERS,
    index_samples: int = 0,
    after_row: Callable[[Record], None] = lambda record: None,
) -> Record:
    """A row for each point and reader, over the images with which the order of `data.sources` begins.

    image_size: pixels of a side, that images are resized to. repeats: rounds, in which the readers take turns.
    starts: how often each is started, to see how long the first batch takes. only: of READERS. index_samples: also what
    opening an index of so many samples takes, of which there are no images. With
    `model.llm.tokenizer` set, ours makes conversations of the captions as in pretraining; without, batches are of
    images alone.

    Raises:
        ValueError: sources that cannot be read, batch sizes that do not divide, or a reader that there is not.
    """
    for name in only:
        if name not in READERS:
            raise ValueError(f"--reader={name!r}: choose from {', '.join(READERS)}")

    def cases_of(point: Overrides) -> list[Case]:
        config = resolve_paths(base.config(point))
        check_relevant("data", [*base.overrides, *point], HEEDED)
        batches = batches_of(config, image_size)
        settings = {
            # Not their paths: the same images elsewhere are the same.
            "sources": data_fingerprint(config.data),
            "samples": sum(map(len, open_sources(config.data))),
            "image_size": image_size,
            "text": text_of(batches),
            "config": config_sections(config, SECTIONS),
        }
        measured = functools.cache(functools.partial(measure, config, batches, only, repeats, starts))
        facts = facts_of(config, precision=None)
        return [
            Case(
                settings | {"reader": name}, facts, functools.partial(row_of, name, config, measured), {"reader": name}
            )
            for name in only
        ]

    facts = {"index": asdict(measure_index(index_samples))} if index_samples else {}
    return run_benchmark(DATA, points, cases_of, session, facts=facts, after_row=after_row)


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


def measure(
    config: Config, batches: BatchMaker, only: Sequence[str], repeats: int, starts: int
) -> Mapping[str, Result | ReaderFailed]:
    """One race of all readers that are installed."""
    workers, batch = config.data.num_workers, config.data.micro_batch_size or config.data.global_batch_size
    # Of the first batch of each start, those that are ready before a round, and the rounds'.
    needed = batch * (1 + repeats * (PREFETCHED * workers + max(1, workers)) + PREFETCHED * workers)
    with tempfile.TemporaryDirectory(prefix="rae-scale-bench-") as scratch:
        readers = make_readers(config, batches, [name for name in only if is_installed(name)], needed, Path(scratch))
        return race(readers, workers=workers, rounds=repeats, starts=starts)


def make_readers(
    config: Config, batches: BatchMaker, names: Sequence[str], needed: int, scratch: Path
) -> dict[str, Reader]:
    """Readers by name, and the copies in `scratch` that they read. needed: images that each will be asked for."""
    data, size = config.data, batches.image_size
    workers, batch = data.num_workers, data.micro_batch_size or data.global_batch_size
    samples = first_samples(config, min(needed, COPIED, sum(map(len, open_sources(data)))))
    shards = write_shards(scratch / "shards", repeated(samples, needed)) if {BARE, "streaming"} & {*names} else scratch
    transform = ImageTransform(size, data.max_pixels, data.crop, data.flip, data.scaled_decode, config.run.seed)
    makers: dict[str, Callable[[], Reader]] = {
        OURS: lambda: Ours(config, batches),
        BARE: lambda: BareLoop(shards, transform, batch, len(samples)),
        "streaming": lambda: Streaming(shards, size, batch, workers),
        "webdataset": lambda: WebDataset(
            write_tars(scratch / "tars", repeated(samples, needed), max(4, workers)), size, batch, workers
        ),
    }
    return {name: makers[name]() for name in names}


def first_samples(config: Config, count: int) -> list[Sample]:
    """Samples with an image, with which the loader begins."""
    update = {"global_batch_size": 1, "micro_batch_size": None, "num_workers": 0, "lanes": 1}
    loader = build_loader(
        config.data.model_copy(update=update),
        seed=config.run.seed,
        image_size=1,
        prepare=sample_with_image,
        collate=list,
        quarantine_path=os.devnull,
    )
    with loader:
        return [sample for step in islice(loader, count) for micro_batch in step for sample in micro_batch]


def sample_with_image(decoded: DecodedSample) -> Sample:
    if decoded.sample.image is None:
        raise BadSample("no image", "the data path is measured on images")
    return decoded.sample


def is_installed(name: str) -> bool:
    return name not in PACKAGES or importlib.util.find_spec(name) is not None


def row_of(name: str, config: Config, measured: Callable[[], Mapping[str, Result | ReaderFailed]]) -> Measured:
    """Raises ValueError when the library is absent, or the reader failed."""
    if not is_installed(name):
        raise ValueError(f"{name} is not installed: pip install {PACKAGES[name]}")
    results = measured()
    result = results[name]
    if isinstance(result, ReaderFailed):
        raise result
    laps, batch = result.laps, config.data.micro_batch_size or config.data.global_batch_size
    measures = {
        "batch": Measure.of([lap.wall * batch / lap.images for lap in laps]),
        "cpu": Measure.of([lap.cpu / lap.images for lap in laps]),
        "first": Measure.of(result.first),
        "memory": Measure.count(result.memory),
    }
    if name == OURS:
        index = seconds_of([lambda: open_sources(config.data)], CPU, repeats=5, warm_up=1)
        measures["index"] = Measure.of(index)
    return Measured(
        measures,
        {
            "images_per_s": batch / measures["batch"].median,
            "images_per_core_s": 1 / measures["cpu"].median,
            "megabytes": result.memory / 1e6,
            **compare(name, results),
        },
    )


def compare(name: str, results: Mapping[str, Result | ReaderFailed]) -> dict[str, float]:
    """CPU time, which is steadier than the clock's on a machine that others use: of the bare loop to this reader's, and
    of this one's to ours."""
    mine, found = results[name], {}
    for column, other, wanted in (("of_bare", BARE, name != BARE), ("slower", OURS, name in PACKAGES)):
        theirs = results.get(other)
        if wanted and isinstance(mine, Result) and isinstance(theirs, Result):
            found[column] = cpu_ratio(theirs, mine) if column == "of_bare" else cpu_ratio(mine, theirs)
    return found


def cpu_ratio(a: Result, b: Result) -> float:
    """Median over the rounds, in each of which both were measured one right after the other."""
    pairs = zip(a.laps, b.laps, strict=True)
    return statistics.median((x.cpu / x.images) / (y.cpu / y.images) for x, y in pairs)


def notes(record: Record) -> list[str]:
    index = record.facts.get("index")
    large = (
        "A process opened an index of {samples:,} samples in {shards:,} shards in {open_s:.2f} s, grew by "
        "{open_mb:.0f} MB ({peak_mb:.0f} MB at the most), and resumed at random places within {resume_s:.3f} s."
    )
    return ([large.format(**index)] if index else []) + [
        "The readers take turns in every round, each in a process of its own that is stopped while others read. "
        "Per core: CPU time of the process and its workers. The bare loop decodes and resizes the same images on one "
        "thread, from memory. streaming and webdataset decode and squash with Pillow. First batch: from nothing open "
        "to it, with the start of the workers. Index: opening the folders. MB: of the process and its workers, shared "
        "pages counted once, all imports included."
    ]


DATA = Benchmark("data", "Data path", COLUMNS, bars("batch", "cpu"), notes=notes)
