"""Images of one unit after the other, decoded in worker processes, through the encoder."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rae_scale.data.latents import Latents, quantise
from rae_scale.data.latents.cache import Form, UnitPlace
from rae_scale.data.latents.unit import BAD_IMAGE, NO_IMAGE
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.record import BadSample
from rae_scale.data.transforms import ImageTransform
from rae_scale.data.workers import leave_signals_to_the_run


@dataclass(frozen=True)
class Images:
    """Those of consecutive samples of a unit.

    pixels:  uint8 [n, S, S, 3], of the samples that have a usable image.
    numbers: of these samples within the unit.
    bad:     reason and detail, by number within the unit, of those whose image cannot be used.
    """

    pixels: Tensor
    numbers: list[int]
    bad: dict[int, tuple[str, str]]


class UnitImages(Dataset[Images]):
    """Item by item the images of `places`, at most `batch_size` in one, none of two units."""

    def __init__(
        self, readers: Sequence[MDSReader], places: Sequence[UnitPlace], transform: ImageTransform, batch_size: int
    ) -> None:
        self.readers = readers
        self.transform = transform
        self.batch_size = batch_size
        self.items = [(place, start) for place in places for start in range(place.start, place.end, batch_size)]

    def __len__(self) -> int:
        return len(self.items)

    def per_unit(self, place: UnitPlace) -> int:
        return -(-(place.end - place.start) // self.batch_size)

    def __getitem__(self, item: int) -> Images:
        place, start = self.items[item]
        pixels, numbers, bad = [], [], {}
        for index in range(start, min(start + self.batch_size, place.end)):
            try:
                image = self.readers[place.source][index].image
                if image is not None:
                    pixels.append(self.transform(image, index))
                    numbers.append(index - place.start)
            except BadSample as problem:
                bad[index - place.start] = (problem.reason, problem.detail)
        side = self.transform.size
        stacked = np.stack(pixels) if pixels else np.empty((0, side, side, 3), dtype=np.uint8)
        return Images(torch.from_numpy(stacked), numbers, bad)


@dataclass(frozen=True)
class EncodedUnit:
    """As `write_unit` takes it."""

    latents: Latents
    rows: list[int]
    bad: dict[int, tuple[str, str]]


def encode_units(
    images: UnitImages,
    places: Sequence[UnitPlace],
    encode: Callable[[Tensor], Tensor],
    form: Form,
    num_workers: int,
    progress: Callable[[], None],
) -> Generator[EncodedUnit]:
    """The latents of each place in turn, on the CPU. Close it to end its workers.

    encode: pixels uint8 [n, S, S, 3] on the CPU to latents [n, T, C] anywhere. progress: called after each batch.
    """
    batches = iter(
        DataLoader(
            images,
            batch_size=None,
            num_workers=num_workers,
            multiprocessing_context="spawn" if num_workers else None,
            worker_init_fn=leave_signals_to_the_run,
            generator=torch.Generator(),
        )
    )
    for place in places:
        rows, bad = [NO_IMAGE] * (place.end - place.start), {}
        # A unit of texts alone has latents of a shape and dtype, too.
        parts = [quantise(torch.empty(0, form.num_tokens, form.channels), form.dtype)]
        row = 0
        for batch in islice(batches, images.per_unit(place)):
            if batch.numbers:
                kept = quantise(encode(batch.pixels), form.dtype)
                parts.append(Latents(*(None if tensor is None else tensor.cpu() for tensor in kept)))
            for number in batch.numbers:
                rows[number], row = row, row + 1
            for number, reason in batch.bad.items():
                rows[number], bad[number] = BAD_IMAGE, reason
            progress()
        values = torch.cat([part.values for part in parts])
        scales = [part.scales for part in parts if part.scales is not None]
        yield EncodedUnit(Latents(values, torch.cat(scales) if scales else None), rows, bad)
