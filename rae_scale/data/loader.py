"""Batches by step: which samples a rank gets is a function of the step alone.

Step s covers the global positions [s * G, (s + 1) * G), G the global batch size; rank r takes the r-th of `dp_world`
equal runs of them, micro-batch m the m-th equal run of those. So the samples of a step are the same for every number of
ranks, micro-batch size and number of workers, and resuming needs nothing but the step. A run that leaves data out gives
`batch_of`: step s then covers the positions that step batch_of(s) would.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
import xxhash
from torch.utils.data import DataLoader

from rae_scale.config.schema import DataConfig, SourceConfig
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.microbatch import MAX_ATTEMPTS, MicroBatch, MicroBatches
from rae_scale.data.mixture import Mixture, integer_ratios
from rae_scale.data.quarantine import Quarantine, TooManyBadSamples
from rae_scale.data.record import DecodedSample

Batch = TypeVar("Batch")
KILL_SECONDS = 5.0  # a process in the middle of a read from storage that is gone does not even die


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
) -> Loader[Batch]:
    """Open `config.sources` and return the endless iterator over the steps of rank `dp_rank`, from `start_step` on.

    prepare: per sample, in the worker (tokenisation, say). BadSample makes the sample a bad one: it is listed in
             `quarantine_path` and replaced by another of its source. Any other error ends the iteration.
    batch_of: number of the global batch that a step has; rises with the step.
    collate: what `prepare` returned for the samples of a micro-batch, to a batch.
    With `config.num_workers` > 0 both are pickled to spawned processes: give functions or methods, not lambdas.

    Raises ValueError for sources that cannot be read and for batch sizes that do not divide.
    """
    per_rank = divide("data.global_batch_size", config.global_batch_size, "data-parallel ranks", dp_world)
    micro_batch_size = config.micro_batch_size or per_rank
    micro_steps = divide("samples per rank", per_rank, "data.micro_batch_size", micro_batch_size)
    readers = open_sources(config.sources)
    dataset = MicroBatches(
        readers=readers,
        mixture=Mixture([len(reader) for reader in readers], [source.weight for source in config.sources], seed),
        image_size=image_size,
        max_pixels=config.max_pixels,
        prepare=prepare,
        collate=collate,
        global_batch_size=config.global_batch_size,
        rank_offset=dp_rank * per_rank,
        micro_batch_size=micro_batch_size,
        micro_steps=micro_steps,
    )
    quarantine = Quarantine(quarantine_path, config.max_bad_fraction)
    return Loader(dataset, quarantine, start_step, config.num_workers, batch_of)


class Loader(Generic[Batch]):
    """Iterator over steps; each item is the list of this rank's micro-batches.

    Its only state is `step`, the step that `next` returns. Raises TooManyBadSamples. Close it, or use it as a context
    manager: that ends the worker processes.
    """

    def __init__(
        self,
        dataset: MicroBatches[Batch],
        quarantine: Quarantine,
        start_step: int,
        num_workers: int,
        batch_of: Callable[[int], int],
    ) -> None:
        self.step = start_step
        self.quarantine = quarantine
        self._micro_steps = dataset.micro_steps
        items = DataLoader(
            dataset,
            batch_size=None,
            sampler=(
                batch_of(s) * dataset.micro_steps + m for s in count(start_step) for m in range(dataset.micro_steps)
            ),
            num_workers=num_workers,
            # A forked child of a process with CUDA or with running threads can deadlock.
            multiprocessing_context="spawn" if num_workers else None,
            worker_init_fn=leave_signals_to_the_run,
            generator=torch.Generator(),  # otherwise it draws from the global one, which belongs to the model
        )
        others = multiprocessing.active_children()
        self._items: Iterator[MicroBatch[Batch]] | None = iter(items)
        self._workers = [child for child in multiprocessing.active_children() if child not in others]

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
        self._items = None  # the iterator owns the workers and joins them when it is dropped
        for worker in self._workers:
            if worker.is_alive():  # a thread still waits for an item, and the worker for its storage
                with contextlib.suppress(RuntimeError):  # by which PyTorch reports a worker that was killed
                    worker.kill()
                    worker.join(KILL_SECONDS)

    def __enter__(self) -> Loader[Batch]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _not_filled(self, item: MicroBatch[Batch]) -> TooManyBadSamples:
        last = item.bad[-1]
        return TooManyBadSamples(
            f"position {last.position}: {MAX_ATTEMPTS} samples of {last.source} in a row could not be used, the last "
            f"one because of {last.reason} ({last.detail}). See {self.quarantine.path}, and rebuild the shards"
        )


def leave_signals_to_the_run(worker: int) -> None:
    """For worker processes: a scheduler signals every process of a job, and the run needs its workers to finish a step.

    They end when the run closes its loader, or with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def open_sources(sources: Sequence[SourceConfig]) -> list[MDSReader]:
    """Readers of all sources. Raises ValueError when there are none, or one is unreadable or empty."""
    if not sources:
        raise ValueError("data.sources is empty; add at least one folder of MDS shards: data.sources=[{path: shards}]")
    readers = [MDSReader(source.path) for source in sources]
    for reader in readers:
        if not len(reader):
            raise ValueError(f"{reader.folder}: holds no samples; see rejected.jsonl in it for what became of them")
    return readers


def data_fingerprint(sources: Sequence[SourceConfig]) -> str:
    """Identifies the data order: hashes of the sources' indexes (which hold the hash of every shard) and their shares.

    Stored in checkpoints: the step alone says where to resume only if the data are the same. Paths are not part of it.
    """
    digest = xxhash.xxh3_128()
    for source, share in zip(sources, integer_ratios([source.weight for source in sources]), strict=True):
        digest.update(f"{MDSReader(source.path).fingerprint}:{share}\n".encode("ascii"))
    return digest.hexdigest()


def divide(name: str, value: int, by_name: str, by: int) -> int:
    if value % by:
        raise ValueError(f"{name}={value} does not divide by {by_name}={by}; choose a multiple of {by}")
    return value // by
