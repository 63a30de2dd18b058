"""A folder of latents that stands in for the images of a mixture's sources.

    <dir>/
        settings.json               what the latents depend on; written first
        source-0/00000.safetensors  units: runs of consecutive samples (`unit.py`)
        index.json                  the units, written once all are there

Nothing in it depends on the order of the data, nor on what a run trains: any run whose settings are the same uses it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rae_scale.data.latents.numbers import LatentDtype, Latents, sample_bytes, zeros
from rae_scale.data.latents.unit import Unit, UnitEntry
from rae_scale.data.mds_writer import write_durably

SETTINGS, INDEX = "settings.json", "index.json"
VERSION = 1
UNIT_BYTES = 64 << 20
UNIT_SAMPLES = 1024
MAX_OPEN_UNITS = 64


@dataclass(frozen=True)
class Form:
    """What the latents of an image are, and in how many units the samples of the sources lie.

    sizes: samples of each source.
    """

    num_tokens: int
    channels: int
    dtype: LatentDtype
    sizes: tuple[int, ...]

    @property
    def sample_bytes(self) -> int:
        return sample_bytes(self.num_tokens, self.channels, self.dtype)

    @property
    def unit_samples(self) -> int:
        """Of every unit but the last of a source: few enough that little is lost when the making of one is cut."""
        return max(1, min(UNIT_SAMPLES, UNIT_BYTES // self.sample_bytes))

    def units(self) -> list[UnitPlace]:
        return [
            UnitPlace(source, number, start, min(start + self.unit_samples, size))
            for source, size in enumerate(self.sizes)
            for number, start in enumerate(range(0, size, self.unit_samples))
        ]


@dataclass(frozen=True)
class UnitPlace:
    """Unit `number` of source number `source`: its samples `start` to `end`."""

    source: int
    number: int
    start: int
    end: int

    @property
    def name(self) -> str:
        return f"source-{self.source}/{self.number:05d}.safetensors"


class LatentCache:
    """The latents of a complete cache, by source and sample. Can be pickled; not to be shared between threads.

    Raises:
        ValueError: the folder holds no complete cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / INDEX).read_bytes())
            self.form = form_from(index["form"])
            self.units = {name: UnitEntry(**entry) for name, entry in index["units"].items()}
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"data.latent_cache.dir={str(folder)!r}: {INDEX} cannot be read ({error}); it is written when all "
                "latents are there, into a folder that every rank must see"
            ) from None
        self._open: OrderedDict[str, Unit] = OrderedDict()

    def latents(self, source: int, index: int) -> Latents:
        """Of sample `index` of source number `source`, [T, C]; zeros if it has no image.

        Raises:
            BadSample: there are none, as its image could not be used, or they are damaged.
            ValueError: a file of the cache is gone or another one.
        """
        number, row = divmod(index, self.form.unit_samples)
        place = UnitPlace(source, number, number * self.form.unit_samples, 0)
        found = self._unit(place.name)[row]
        return zeros((self.form.num_tokens, self.form.channels), self.form.dtype) if found is None else found

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def _unit(self, name: str) -> Unit:
        if name not in self._open:
            while len(self._open) >= MAX_OPEN_UNITS:
                self._open.popitem(last=False)[1].close()
            self._open[name] = self._checked(name)
        self._open.move_to_end(name)
        return self._open[name]

    def _checked(self, name: str) -> Unit:
        path = self.folder / name
        try:
            unit = Unit(path)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}, but {INDEX} lists it; start again to make it anew") from None
        if unit.head != self.units[name].head:
            unit.close()
            raise ValueError(
                f"{path}: not the file that {INDEX} lists (its hash is another); remove it and start again"
            )
        return unit

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def form_from(values: Mapping[str, Any]) -> Form:
    return Form(**{**values, "sizes": tuple(values["sizes"])})


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    write_json(folder / SETTINGS, {"version": VERSION, **settings})


def check_settings(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether there is a cache in `folder`, begun or complete.

    Raises:
        ValueError: there is one of other settings; says which.
    """
    try:
        found = json.loads((folder / SETTINGS).read_bytes())
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise ValueError(f"{folder / SETTINGS}: {error}; remove the folder, or choose another one") from None
    wanted = json.loads(json.dumps({"version": VERSION, **wanted}))
    names = [*wanted, *(name for name in found if name not in wanted)]
    different = [
        f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]
    if different:
        raise ValueError(
            f"data.latent_cache.dir={str(folder)!r} holds the latents of other settings:\n  "
            + "\n  ".join(different)
            + "\nchoose another dir, put the settings back, or remove that folder to make the latents anew"
        )
    return True


def write_index(folder: Path, form: Form, entries: Sequence[UnitEntry]) -> None:
    """entries: of `form.units()`, in that order."""
    units = {place.name: asdict(entry) for place, entry in zip(form.units(), entries, strict=True)}
    write_json(folder / INDEX, {"version": VERSION, "form": asdict(form), "units": units})


def write_json(path: Path, content: object) -> None:
    write_durably(path, [json.dumps(content, indent=1).encode("ascii")])
