"""Ways to get batches of the same images: ours, a bare loop, and the customary pipelines of two other libraries.

Each is a small picklable object that a process of its own opens. Those libraries are imported there only: one of them
takes five seconds.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from rae_scale.config import Config
from rae_scale.data.loader import build_loader
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.transforms import ImageTransform
from rae_scale.train.batches import BatchMaker

SHUFFLE_BUFFER = 1000
"""Samples, as webdataset's own examples have it."""


Batches = Generator[int, None, None]
"""The number of images of batch after batch, without end. Closing it ends its workers."""


class Reader(Protocol):
    library: ClassVar[str | None]
    """What must be installed, as it is imported."""

    def prepare(self) -> None:
        """Import what is needed: a process does that once, whatever it reads."""

    def open(self) -> Batches: ...


@dataclass(frozen=True)
class Ours:
    """The whole path of a run: order, reading, decoding, text, stacking."""

    library: ClassVar[str | None] = None
    config: Config
    batches: BatchMaker

    def prepare(self) -> None: ...

    def open(self) -> Batches:
        loader = build_loader(
            self.config.data,
            seed=self.config.run.seed,
            image_size=self.batches.image_size,
            prepare=self.batches.prepare,
            collate=self.batches.collate,
            quarantine_path=os.devnull,
        )
        with loader:
            for step in loader:
                yield from map(len, step)


@dataclass(frozen=True)
class BareLoop:
    """Decode, crop and resize images that are in memory, on one thread: what no data path can do without."""

    library: ClassVar[str | None] = None
    shards: Path
    transform: ImageTransform
    batch: int
    distinct: int

    def prepare(self) -> None: ...

    def open(self) -> Batches:
        reader = MDSReader(self.shards)
        images = [image for number in range(self.distinct) if (image := reader[number].image) is not None]
        turns = enumerate(cycle(images))
        while True:
            for index, image in islice(turns, self.batch):
                self.transform(image, index)
            yield self.batch


@dataclass(frozen=True)
class PillowTransform:
    """Decode with Pillow, squash with its bicubic filter, floats in [0, 1] with channels first, as `ToTensor` does."""

    size: int

    def __call__(self, image: Image.Image) -> torch.Tensor:
        resized = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


@dataclass(frozen=True)
class Streaming:
    """mosaicml's StreamingDataset, shuffled, in PyTorch's loader."""

    library: ClassVar[str | None] = "streaming"
    shards: Path
    size: int
    batch: int
    workers: int

    def prepare(self) -> None:
        import streaming  # noqa: F401

    def open(self) -> Batches:
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        transform = PillowTransform(self.size)

        class Pictures(StreamingDataset):
            def __getitem__(self, index: Any) -> Any:
                sample = super().__getitem__(index)
                return transform(Image.open(io.BytesIO(sample["image"]))), sample["captions"][0]

        clean_stale_shared_memory()  # of the dataset that this process had open before
        dataset = Pictures(local=str(self.shards), batch_size=self.batch, shuffle=True, num_canonical_nodes=1)
        yield from endless(dataset, self.batch, self.workers)


@dataclass(frozen=True)
class WebDataset:
    """webdataset over tars, shuffled in a buffer, in PyTorch's loader."""

    library: ClassVar[str | None] = "webdataset"
    tars: tuple[Path, ...]
    size: int
    batch: int
    workers: int

    def prepare(self) -> None:
        import webdataset  # noqa: F401

    def open(self) -> Batches:
        import webdataset

        dataset = (
            webdataset.WebDataset([str(path) for path in self.tars], shardshuffle=len(self.tars))
            .shuffle(SHUFFLE_BUFFER)
            .decode("pil")
            .to_tuple("jpg;png;webp", "txt")
            .map_tuple(PillowTransform(self.size), str)
            .batched(self.batch, partial=False)
        )
        yield from endless(dataset, None, self.workers)


def endless(dataset: Any, batch: int | None, workers: int) -> Batches:
    """The images per batch of PyTorch's loader, epoch after epoch. batch: None if the dataset makes batches."""
    # Forked, as the loader does of itself; in a process that was spawned, it would spawn.
    context = "fork" if workers else None
    loader = DataLoader(dataset, batch_size=batch, num_workers=workers, multiprocessing_context=context)
    while True:
        for images, _ in loader:
            yield len(images)
