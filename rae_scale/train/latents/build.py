"""Before the first step: every image of the sources through the encoder, once for all runs with the same settings.

The ranks encode a unit each, round by round. A unit is there whole or not at all, so that a build which was stopped or
killed goes on with those that are missing, on however many ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rae_scale.config import Config
from rae_scale.data.latents import LatentCache
from rae_scale.data.latents.cache import Form, UnitPlace, write_index
from rae_scale.data.latents.unit import UnitEntry, write_unit
from rae_scale.data.loader import open_sources
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.transforms import ImageTransform, to_float
from rae_scale.models.encoders import FrozenEncoder
from rae_scale.parallel import Mesh
from rae_scale.state.agreement import agree, on_main
from rae_scale.train.latents.encode import UnitImages, encode_units
from rae_scale.train.latents.missing import Todo, begin, form_of
from rae_scale.train.latents.settings import latent_settings
from rae_scale.train.watch import Phase, Watch

logger = logging.getLogger(__name__)
LOG_SECONDS = 10.0


def prepare_latents(config: Config, encoder: FrozenEncoder, mesh: Mesh, watch: Watch) -> LatentCache:
    """The cache that `config.data.latent_cache` names, made or completed if need be. Collective.

    encoder: on the CPU. It goes to the device only if something has to be encoded.

    Raises:
        ValueError: the folder holds latents of other settings, another process is making them, there is no room for
            them, or a rank could not write its part (on all ranks).
        StopAsked: on all ranks, if any was asked to stop; the next start goes on from there.
    """
    assert config.data.latent_cache is not None
    folder = Path(config.data.latent_cache.dir)
    readers = open_sources(config.data)
    form = form_of(config, readers, encoder)
    with ExitStack() as held:
        for reader in readers:
            held.callback(reader.close)

        def find() -> Todo | None:
            return begin(folder, latent_settings(config, readers, encoder), form, readers, held)

        todo = agree(mesh, find if mesh.is_main else lambda: None)[0]
        assert todo is not None
        if todo.missing:
            entries = todo.entries | build(config, folder, form, todo, readers, encoder, mesh, watch)
            on_main(mesh, lambda: finish(folder, form, entries))
    return agree(mesh, lambda: LatentCache(folder))[mesh.rank]


def build(
    config: Config,
    folder: Path,
    form: Form,
    todo: Todo,
    readers: Sequence[MDSReader],
    encoder: FrozenEncoder,
    mesh: Mesh,
    watch: Watch,
) -> dict[str, UnitEntry]:
    """Make the missing units; the entries of all of them, on every rank. Collective."""
    data = config.data
    assert data.latent_cache is not None
    mine = todo.missing[mesh.rank :: mesh.world_size]
    transform = ImageTransform(encoder.image_size, data.max_pixels, data.crop, scaled_decode=data.scaled_decode)
    images = UnitImages(readers, mine, transform, data.latent_cache.batch_size)
    encoded = encode_units(
        images,
        mine,
        encode_on(encoder.to(mesh.device), mesh.device, config.engine.precision == "bf16"),
        form,
        data.num_workers,
        lambda: watch.enter(Phase.START, 0),
    )
    entries: dict[str, UnitEntry] = {}
    progress = Progress(sum(place.end - place.start for place in todo.missing))
    with closing(encoded):

        def next_unit(place: UnitPlace | None) -> UnitEntry | None:
            if place is None:
                return None
            unit = next(encoded)
            return write_unit(folder / place.name, unit.latents, unit.rows, unit.bad)

        # Together after each unit: no rank waits long for another, and a failure or a signal ends all of them.
        for start in range(0, len(todo.missing), mesh.world_size):
            places = todo.missing[start : start + mesh.world_size]
            place = places[mesh.rank] if mesh.rank < len(places) else None
            made = agree(mesh, partial(next_unit, place))
            entries |= {place.name: entry for place, entry in zip(places, made, strict=False) if entry is not None}
            progress.add(entry for entry in made if entry is not None)
            watch.leave_if_asked(mesh)
    return entries


def finish(folder: Path, form: Form, entries: Mapping[str, UnitEntry]) -> None:
    # By listing the folders: a network file system may remember of single names that they were not there.
    there = {str(path.relative_to(folder)) for path in folder.glob("source-*/*")}
    lost = [place.name for place in form.units() if place.name not in there]
    if lost:
        raise ValueError(
            f"data.latent_cache.dir={str(folder)!r}: {len(lost)} files that other ranks have written are not there, "
            f"{lost[0]} first; choose a folder that all machines share"
        )
    write_index(folder, form, [entries[place.name] for place in form.units()])


def encode_on(encoder: FrozenEncoder, device: torch.device, bf16: bool) -> Callable[[Tensor], Tensor]:
    """As a training step does it (`GenerationStage.prepare`, below the engine's autocast)."""

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            return encoder(to_float(pixels.to(device)))

    return encode


class Progress:
    """Logs how far the build is, every few seconds and at its end."""

    def __init__(self, samples: int) -> None:
        self.samples, self.done, self.images, self.bad = samples, 0, 0, 0
        self.began = self.logged = time.monotonic()

    def add(self, entries: Iterable[UnitEntry]) -> None:
        for entry in entries:
            self.done += entry.samples
            self.images += entry.images
            self.bad += entry.bad
        now = time.monotonic()
        if now - self.logged < LOG_SECONDS and self.done < self.samples:
            return
        self.logged = now
        rate = self.done / max(now - self.began, 1e-9)
        logger.info(
            "latent cache: %s of %s samples, %.0f/s, %.0f s left; %s images encoded, %s cannot be used",
            f"{self.done:,}",
            f"{self.samples:,}",
            rate,
            (self.samples - self.done) / rate,
            f"{self.images:,}",
            f"{self.bad:,}",
        )
