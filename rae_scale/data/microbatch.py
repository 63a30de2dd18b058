"""Makes any micro-batch of a rank from its number alone, replacing samples that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import numpy as np
from torch.utils.data import Dataset

from rae_scale.data.captions import draw_caption
from rae_scale.data.latents import LatentCache
from rae_scale.data.lookahead import Lookahead
from rae_scale.data.mds_reader import BadShard, MDSReader
from rae_scale.data.mixture import Location, Mixture
from rae_scale.data.quarantine import BadRecord
from rae_scale.data.record import BadSample, DecodedSample, Sample
from rae_scale.data.transforms import ImageTransform

Batch = TypeVar("Batch")

# With half of all samples bad, one position in 65,536 needs more.
MAX_ATTEMPTS = 16


@dataclass(frozen=True)
class MicroBatch(Generic[Batch]):
    """What a worker hands over.

    batch: None when a position could not be filled; `bad` then ends with the last attempt at it.
    seen:  how many positions were asked for.
    bad:   travels as data, so that one process per rank counts and writes it.
    """

    batch: Batch | None
    seen: int
    bad: list[BadRecord]

    def pin_memory(self) -> MicroBatch[Batch]:
        """Called by PyTorch's loader if it is to pin; the batch must know how to."""
        return self if self.batch is None else replace(self, batch=cast(Any, self.batch).pin_memory())


@dataclass(frozen=True)
class MicroBatches(Dataset[MicroBatch[Batch]]):
    """Item `batch * micro_steps + m` is this rank's micro-batch m of a global batch; random access.

    rank_offset: where this rank's run of positions begins within a global batch.
    lookahead:   has shards fetched ahead of their use; what it remembers changes no item.
    """

    readers: Sequence[MDSReader]
    mixture: Mixture
    lookahead: Lookahead
    transform: ImageTransform
    latents: LatentCache | None
    draw_captions: bool
    seed: int
    prepare: Callable[[DecodedSample], Any]
    collate: Callable[[list[Any]], Batch]
    global_batch_size: int
    rank_offset: int
    micro_batch_size: int
    micro_steps: int

    def __getitem__(self, number: int) -> MicroBatch[Batch]:
        batch, micro = divmod(number, self.micro_steps)
        start = batch * self.global_batch_size + self.rank_offset + micro * self.micro_batch_size
        positions = range(start, start + self.micro_batch_size)
        located = self.mixture.locate_many(np.array(positions))
        self.lookahead.advance(located.blocks)
        # Where the batch's images will lie: to resize them to elsewhere and to stack them then costs 3 % of all.
        size = self.transform.size
        block = np.empty((len(positions), size, size, 3), np.uint8)
        bad: list[BadRecord] = []
        prepared = []
        for position, location, pixels in zip(positions, located, block, strict=True):
            sample = self.fill(position, location, pixels, bad)
            if sample is None:
                return MicroBatch(None, self.micro_batch_size, bad)
            prepared.append(sample)
        return MicroBatch(self.collate(prepared), self.micro_batch_size, bad)

    def close(self) -> None:
        """Let go of open files, and of the threads that fetch ahead, of this process."""
        for reader in self.readers:
            reader.close()
        if self.latents is not None:
            self.latents.close()

    def fill(self, position: int, location: Location, pixels: np.ndarray, bad: list[BadRecord]) -> Any:
        """The prepared sample for a position, at `location` or what replaces it; None after MAX_ATTEMPTS bad ones,
        which are added to `bad`. pixels: to be written, uint8 [size, size, 3]."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            key = ""
            try:
                sample = self.readers[location.source][location.index]
                key = sample.key
                return self.prepare(self.decode(sample, location, position, pixels))
            except BadSample as problem:
                bad.append(self.bad_record(location, position, key, problem))
            location = self.mixture.substitute(position, attempt)
        return None

    def decode(self, sample: Sample, location: Location, position: int, pixels: np.ndarray) -> DecodedSample:
        sample_id = f"{self.readers[location.source].name}:{location.index}:{sample.key}"
        if self.draw_captions and len(sample.captions) > 1:
            sample, number = draw_caption(sample, self.seed, position)
            sample_id += f":caption {number}"
        if self.latents is not None:
            latents = self.latents.latents(location.source, location.index)
            return DecodedSample(position, sample_id, sample, None, latents)
        image = None if sample.image is None else self.transform(sample.image, position, pixels)
        return DecodedSample(position, sample_id, sample, image)

    def bad_record(self, location: Location, position: int, key: str, problem: BadSample) -> BadRecord:
        reader = self.readers[location.source]
        shard, _ = reader.locate(location.index)
        record = BadRecord(
            source=reader.source,
            shard=reader.shard_name(shard),
            index=location.index,
            key=key,
            position=position,
            reason=problem.reason,
            detail=problem.detail,
        )
        if not isinstance(problem, BadShard):
            return record
        samples = int(reader.sizes[shard])
        share = self.mixture.shares[location.source] / sum(self.mixture.shares)
        return replace(record, shard_lost=True, samples=samples, lost=share * samples / len(reader))
