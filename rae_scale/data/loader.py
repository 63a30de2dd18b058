"""Batches by step: which samples a rank gets is a function of the step alone.

Step s covers the global positions [s * G, (s + 1) * G), G the global batch size; rank r takes the r-th of `dp_world`
equal runs of them, micro-batch m the m-th equal run of those. So the samples of a step are the same for every number of
ranks, micro-batch size and number of workers, and resuming needs nothing but the step. A run that leaves data out gives
`batch_of`: step s then covers the positions that step batch_of(s) would.

A worker process that is killed changes nothing either (`workers.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import xxhash

from rae_scale.config.schema import DataConfig
from rae_scale.data.latents import LatentCache
from rae_scale.data.lookahead import Lookahead, working_set
from rae_scale.data.mds_reader import MDSReader, source_fingerprint
from rae_scale.data.microbatch import MAX_ATTEMPTS, MicroBatch, MicroBatches
from rae_scale.data.mixture import Mixture, integer_ratios
from rae_scale.data.quarantine import Quarantine, TooManyBadSamples
from rae_scale.data.read_options import ReadOptions, settings_of_the_cache
from rae_scale.data.record import DecodedSample
from rae_scale.data.transforms import ImageTransform
from rae_scale.data.workers import Workers

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")


def build_loader(
    config: DataConfig,
    *,
    seed: int,
    image_size: int,
    prepare: Callable[[DecodedSample], Any],
    collate: Callable[[list[Any]], Batch],
    quarantine_path: str | Path,
    dp_rank: int = 0,
    dp_world: int = 1,
    start_step: int = 0,
    batch_of: Callable[[int], int] = lambda step: step,
    pin_memory: bool = False,
    latents: LatentCache | None = None,
) -> Loader[Batch]:
    """Open `config.sources` and return the endless iterator over the steps of rank `dp_rank`, from `start_step` on.

    prepare: per sample, in the worker (tokenisation, say). BadSample makes the sample a bad one: it is listed in
             `quarantine_path` and replaced by another of its source. Any other error ends the iteration.
    batch_of: number of the global batch that a step has; rises with the step.
    collate: what `prepare` returned for the samples of a micro-batch, to a batch.
    pin_memory: batches, which then have a method of that name, in page-locked memory, for a GPU.
    latents: of the images of `config.sources`, which are then not decoded.
    With `config.num_workers` > 0 both are pickled to spawned processes: give functions or methods, not lambdas.

    Raises ValueError for sources that cannot be read and for batch sizes or lanes that do not divide.
    """
    dataset = build_micro_batches(
        config,
        seed=seed,
        image_size=image_size,
        prepare=prepare,
        collate=collate,
        dp_rank=dp_rank,
        dp_world=dp_world,
        latents=latents,
    )
    if dp_rank == 0:
        warn_about_lanes(config, dp_world)
        warn_about_cache(config, dataset, dp_world)
    quarantine = Quarantine(quarantine_path, config.max_bad_fraction)
    return Loader(dataset, quarantine, start_step, config.num_workers, batch_of, pin_memory)


def build_micro_batches(
    config: DataConfig,
    *,
    seed: int,
    image_size: int,
    prepare: Callable[[DecodedSample], Any],
    collate: Callable[[list[Any]], Batch],
    dp_rank: int = 0,
    dp_world: int = 1,
    latents: LatentCache | None = None,
) -> MicroBatches[Batch]:
    """The micro-batches of a rank by their numbers: what a loader iterates over. See build_loader."""
    per_rank = divide("data.global_batch_size", config.global_batch_size, "data-parallel ranks", dp_world)
    micro_batch_size = config.micro_batch_size or per_rank
    micro_steps = divide("samples per rank", per_rank, "data.micro_batch_size", micro_batch_size)
    readers = open_sources(config)
    mixture = mixture_of(config, readers, seed)
    return MicroBatches(
        readers=readers,
        mixture=mixture,
        lookahead=Lookahead(mixture.order, readers, config.prefetch_blocks),
        transform=ImageTransform(image_size, config.max_pixels, config.crop, config.flip, config.scaled_decode, seed),
        latents=latents,
        draw_captions=config.caption_choice == "weighted",
        seed=seed,
        prepare=prepare,
        collate=collate,
        global_batch_size=config.global_batch_size,
        rank_offset=dp_rank * per_rank,
        micro_batch_size=micro_batch_size,
        micro_steps=micro_steps,
    )


class Loader(Generic[Batch]):
    """Iterator over steps; each item is the list of this rank's micro-batches.

    Its only state is `step`, the step that `next` returns. Raises TooManyBadSamples, and WorkerDied (see `Workers`).
    Close it, or use it as a context manager: that ends the worker processes.
    """

    def __init__(
        self,
        dataset: MicroBatches[Batch],
        quarantine: Quarantine,
        start_step: int,
        num_workers: int,
        batch_of: Callable[[int], int],
        pin_memory: bool = False,
    ) -> None:
        self.step = start_step
        self.quarantine = quarantine
        self._dataset = dataset
        self._micro_steps = dataset.micro_steps
        self._batch_of = batch_of
        self._first_item = start_step * dataset.micro_steps
        self._items: Workers[MicroBatch[Batch]] | None = Workers(dataset, self._numbers, num_workers, pin_memory)

    def __iter__(self) -> Loader[Batch]:
        return self

    def __next__(self) -> list[Batch]:
        if self._items is None:
            raise ValueError("this loader is closed; build another one with start_step to go on")
        batches = []
        for _ in range(self._micro_steps):
            item = next(self._items)
            self.quarantine.add(item.seen, item.bad)
            if item.batch is None:
                raise self._not_filled(item)
            batches.append(item.batch)
        self.step += 1
        return batches

    def close(self) -> None:
        if self._items is not None:
            self._items.close()
            self._items = None
            self._dataset.close()
            self.quarantine.close()

    def __enter__(self) -> Loader[Batch]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _numbers(self, taken: int) -> Iterator[int]:
        """Which micro-batches of all those of this rank come, after the first `taken`."""
        for number in count(self._first_item + taken):
            step, micro = divmod(number, self._micro_steps)
            yield self._batch_of(step) * self._micro_steps + micro

    def _not_filled(self, item: MicroBatch[Batch]) -> TooManyBadSamples:
        last = item.bad[-1]
        return TooManyBadSamples(
            f"position {last.position}: {MAX_ATTEMPTS} samples of {last.source} in a row could not be used, the last "
            f"one because of {last.reason} ({last.detail}). See {self.quarantine.path}, and rebuild the shards"
        )


def open_sources(data: DataConfig) -> list[MDSReader]:
    """Readers of all sources. Raises ValueError when there are none, or one is unreadable or empty."""
    if not data.sources:
        raise ValueError("data.sources is empty; add at least one folder of MDS shards: data.sources=[{path: shards}]")
    options = ReadOptions.of(data)
    readers = [MDSReader(source.path, options) for source in data.sources]
    for reader in readers:
        if not len(reader):
            raise ValueError(f"{reader.source}: holds no samples; see rejected.jsonl in it for what became of them")
    return readers


def mixture_of(data: DataConfig, readers: Sequence[MDSReader], seed: int) -> Mixture:
    """The order in which a run with these settings reads its sources."""
    return Mixture(
        [reader.sizes for reader in readers],
        [source.weight for source in data.sources],
        seed,
        lanes=data.lanes,
        shuffle_block=data.shuffle_block,
        global_batch_size=data.global_batch_size,
    )


def data_fingerprint(data: DataConfig) -> str:
    """Identifies the data order: hashes of the sources' indexes (which hold the hash of every shard) and their shares,
    and the settings of the order as far as they change it.

    Stored in checkpoints: the step alone says where to resume only if the data are the same. Paths are not part of it.
    """
    options = ReadOptions.of(data)
    digest = xxhash.xxh3_128()
    for source, share in zip(data.sources, integer_ratios([source.weight for source in data.sources]), strict=True):
        digest.update(f"{source_fingerprint(source.path, options)}:{share}\n".encode("ascii"))
    settings = ""
    if data.lanes > 1:
        settings = f" lanes={data.lanes} shuffle_block={data.shuffle_block} global_batch_size={data.global_batch_size}"
    elif any(len(reader) > data.shuffle_block for reader in open_sources(data)):
        settings = f" shuffle_block={data.shuffle_block}"
    return digest.hexdigest() + settings


def warn_about_lanes(data: DataConfig, ranks: int) -> None:
    if data.lanes % ranks and ranks % data.lanes:
        logger.warning(
            "data.lanes=%d over %d data-parallel ranks: some ranks read parts of several lanes, and need the shards of "
            "all of them. The data are the same; to read less choose a multiple of the number of nodes",
            data.lanes,
            ranks,
        )


def warn_about_cache(data: DataConfig, dataset: MicroBatches[Any], ranks: int) -> None:
    if not any(reader.fetches for reader in dataset.readers):
        if unused := settings_of_the_cache(data):
            logger.warning("%s: not used, every source is read where it lies", ", ".join(unused))
        return
    lanes = -(-data.lanes // ranks)
    needed = working_set(dataset.mixture.order, dataset.readers, lanes, data.prefetch_blocks) / 1e9
    if needed > data.cache_gb:
        logger.warning(
            "data.cache_gb=%g is less than the %.3g GB that the shuffle blocks of one rank's lanes take: their shards "
            "are fetched again and again. Raise it, or lower data.shuffle_block=%d or data.prefetch_blocks=%d",
            data.cache_gb,
            needed,
            data.shuffle_block,
            data.prefetch_blocks,
        )


def divide(name: str, value: int, by_name: str, by: int) -> int:
    if value % by:
        raise ValueError(f"{name}={value} does not divide by {by_name}={by}; choose a multiple of {by}")
    return value // by
