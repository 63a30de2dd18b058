"""Which units of a latent cache are missing, and whether there is room for them."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rae_scale.config import Config
from rae_scale.data.latents import LatentCache
from rae_scale.data.latents.cache import INDEX, Form, UnitPlace, check_settings, write_settings
from rae_scale.data.latents.unit import UnitEntry, entry_of
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.record import BadSample
from rae_scale.models.encoders import FrozenEncoder
from rae_scale.state.space import GB, free_bytes

logger = logging.getLogger(__name__)
PROBES = 32
LOCK = ".lock"


@dataclass(frozen=True)
class Todo:
    """missing: units that are to be made; entries: of the others, by name."""

    missing: list[UnitPlace]
    entries: dict[str, UnitEntry] = field(default_factory=dict)


def form_of(config: Config, readers: Sequence[MDSReader], encoder: FrozenEncoder) -> Form:
    assert config.data.latent_cache is not None
    dtype = config.data.latent_cache.dtype
    return Form(encoder.num_tokens, encoder.channels, dtype, tuple(map(len, readers)))


def describe_cache(config: Config, readers: Sequence[MDSReader], encoder: FrozenEncoder) -> str:
    """What the cache takes, and whether it is there. `encoder`: its sizes count."""
    assert config.data.latent_cache is not None
    folder, form = Path(config.data.latent_cache.dir), form_of(config, readers, encoder)
    size = expected_bytes(form.units(), form, readers) / GB
    state = "complete" if is_complete(folder, form) else f"not complete, {free_bytes(folder) / GB:,.3g} GB free there"
    return (
        f"latent cache {folder} ({form.dtype}): {form.sample_bytes:,} bytes per image, about {size:,.3g} GB, {state}; "
        "no step runs the encoder"
    )


def begin(folder: Path, settings: dict[str, Any], form: Form, readers: Sequence[MDSReader], held: ExitStack) -> Todo:
    """Which units are missing. If any is, the folder stays locked until `held` is closed."""
    there = check_settings(folder, settings)
    if there and is_complete(folder, form):
        logger.info("latent cache %s: complete, %s samples", folder, f"{sum(form.sizes):,}")
        return Todo([])
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(folder))
    there = check_settings(folder, settings)
    if there and is_complete(folder, form):  # another process has just finished
        return Todo([])
    entries = {place.name: entry for place in form.units() if (entry := intact_entry(folder, place)) is not None}
    missing = [place for place in form.units() if place.name not in entries]
    size = expected_bytes(missing, form, readers)
    check_space(folder, size)
    samples = sum(place.end - place.start for place in missing)
    logger.info(
        "latent cache %s: %s of %s samples are to be encoded, about %.3g GB",
        folder,
        f"{samples:,}",
        f"{sum(form.sizes):,}",
        size / GB,
    )
    if not there:
        write_settings(folder, settings)
    (folder / INDEX).unlink(missing_ok=True)  # from now on units are what their files say
    for number in range(len(form.sizes)):
        (folder / f"source-{number}").mkdir(exist_ok=True)
    return Todo(missing, entries)


def is_complete(folder: Path, form: Form) -> bool:
    """Whether there is an index whose files are all there, as long as they were. What is in them is checked as it is
    read."""
    if not (folder / INDEX).is_file():
        return False
    cache = LatentCache(folder)
    problems = [name for name, entry in cache.units.items() if size_of(folder / name) != entry.bytes]
    if problems or cache.form != form:
        logger.warning("latent cache %s: %d files are gone or cut, %s first", folder, len(problems), problems[:1])
        return False
    return True


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def intact_entry(folder: Path, place: UnitPlace) -> UnitEntry | None:
    try:
        entry = entry_of(folder / place.name)
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s", error)
        return None
    return entry if entry.samples == place.end - place.start else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"data.latent_cache.dir={str(folder)!r}: another run is making these latents; start again when it has, "
                "or make them first with `rae-scale data latents`"
            ) from None
        yield


def expected_bytes(missing: Sequence[UnitPlace], form: Form, readers: Sequence[MDSReader]) -> int:
    """Of the units to be made, if as many of their samples have images as of a few of each source."""
    shares = [image_share(reader) for reader in readers]
    return round(sum((place.end - place.start) * shares[place.source] for place in missing) * form.sample_bytes)


def image_share(reader: MDSReader) -> float:
    count = min(PROBES, len(reader))
    images = sum(has_image(reader, number * len(reader) // count) for number in range(count))
    return images / count


def has_image(reader: MDSReader, index: int) -> bool:
    try:
        return reader[index].image is not None
    except BadSample:
        return False


def check_space(folder: Path, size: int) -> None:
    free = free_bytes(folder)
    if free < size:
        raise ValueError(
            f"data.latent_cache.dir={str(folder)!r}: the latents take about {size / GB:.3g} GB, and {free / GB:.3g} GB "
            "are free; choose a dir with more room, set data.latent_cache.dtype=int8, which halves bf16, or remove "
            "data.latent_cache to encode in every step"
        )
