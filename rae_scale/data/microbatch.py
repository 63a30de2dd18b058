"""Makes any micro-batch of a rank from its number alone, replacing samples that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch.utils.data import Dataset

from rae_scale.data.decode import decode_image
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.mixture import Location, Mixture
from rae_scale.data.quarantine import BadRecord
from rae_scale.data.record import BadSample, DecodedSample, Sample
from rae_scale.data.transforms import resize_square

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


@dataclass(frozen=True)
class MicroBatches(Dataset[MicroBatch[Batch]]):
    """Item `step * micro_steps + m` is micro-batch m of a step; random access, no state.

    rank_offset: where this rank's run of positions begins within a step.
    """

    readers: Sequence[MDSReader]
    mixture: Mixture
    image_size: int
    max_pixels: int
    prepare: Callable[[DecodedSample], Any]
    collate: Callable[[list[Any]], Batch]
    global_batch_size: int
    rank_offset: int
    micro_batch_size: int
    micro_steps: int

    def __getitem__(self, number: int) -> MicroBatch[Batch]:
        step, micro = divmod(number, self.micro_steps)
        start = step * self.global_batch_size + self.rank_offset + micro * self.micro_batch_size
        bad: list[BadRecord] = []
        prepared = []
        for position in range(start, start + self.micro_batch_size):
            sample = self.fill(position, bad)
            if sample is None:
                return MicroBatch(None, self.micro_batch_size, bad)
            prepared.append(sample)
        return MicroBatch(self.collate(prepared), self.micro_batch_size, bad)

    def fill(self, position: int, bad: list[BadRecord]) -> Any:
        """The prepared sample for a position, or None after MAX_ATTEMPTS bad ones, which are added to `bad`."""
        location = self.mixture.locate(position)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            key = ""
            try:
                sample = self.readers[location.source][location.index]
                key = sample.key
                return self.prepare(self.decode(sample, location, position))
            except BadSample as problem:
                bad.append(self.bad_record(location, position, key, problem))
            location = self.mixture.substitute(position, attempt)
        return None

    def decode(self, sample: Sample, location: Location, position: int) -> DecodedSample:
        pixels = None
        if sample.image is not None:
            pixels = resize_square(decode_image(sample.image, self.max_pixels), self.image_size)
        folder = self.readers[location.source].folder
        return DecodedSample(position, f"{folder.name}:{location.index}:{sample.key}", sample, pixels)

    def bad_record(self, location: Location, position: int, key: str, problem: BadSample) -> BadRecord:
        reader = self.readers[location.source]
        shard, _ = reader.locate(location.index)
        return BadRecord(
            source=str(reader.folder),
            shard=reader.shards[shard].path.name,
            index=location.index,
            key=key,
            position=position,
            reason=problem.reason,
            detail=problem.detail,
        )
