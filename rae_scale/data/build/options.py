"""What a build is asked for: recorded once per folder, and by its hash in every unit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash

from rae_scale.data.adapters import make_adapter
from rae_scale.data.build.inputs import InputFile
from rae_scale.data.dedup.near import MAX_DISTANCE
from rae_scale.data.mds_writer import DEFAULT_SHARD_BYTES, check_shard_bytes
from rae_scale.data.prepare import PrepareOptions, prepare_sample
from rae_scale.data.record import BadSample, Sample
from rae_scale.data.sources import Item, Source


@dataclass(frozen=True)
class BuildOptions:
    """Everything that the bytes of the output depend on, the inputs excepted.

    shard_bytes:     a shard is closed before it would exceed this.
    adapter:         how the inputs are read, with its own options: see `rae_scale.data.sources.Source`.
    prepare:         what is refused, and what is done to the images.
    dedup:           leave out samples with the content of an earlier one ("exact"), also images that look nearly like
                     an earlier one ("near"): see `rae_scale.data.dedup`.
    near_distance:   of 64 bits, how many may differ between the perceptual hashes of near duplicates.
    """

    shard_bytes: int = DEFAULT_SHARD_BYTES
    adapter: str = "auto"
    adapter_options: Mapping[str, str] = field(default_factory=dict)
    prepare: PrepareOptions = field(default_factory=PrepareOptions)
    dedup: Literal["off", "exact", "near"] = "off"
    near_distance: int | None = None

    def __post_init__(self) -> None:
        check_shard_bytes(self.shard_bytes)
        if self.dedup not in ("off", "exact", "near"):
            raise ValueError(f"dedup={self.dedup!r}: choose off, exact or near")
        if self.dedup != "near" and self.near_distance is not None:
            raise ValueError(f"near_distance={self.near_distance} changes nothing with dedup={self.dedup}; use near")
        if self.dedup == "near" and (self.near_distance is None or not 0 <= self.near_distance <= MAX_DISTANCE):
            raise ValueError(f"near_distance={self.near_distance}: choose 0 to {MAX_DISTANCE} for dedup=near")

    def source(self, path: Path) -> Source:
        """An input file, opened as it is asked for. Raises ValueError or FileNotFoundError."""
        return Source(path, self.adapter, self.adapter_options)

    def usable(self, item: Item) -> Sample:
        """The sample as it is to be written. Raises BadSample."""
        if item.sample is None:
            raise item.problem or BadSample("no sample", f"{item.key} holds nothing")
        return prepare_sample(item.sample, self.prepare)

    def recorded(self) -> dict[str, Any]:
        """As JSON values, one level deep (`prepare.verify`), with the hashes of the adapter's other files."""
        values = flat(asdict(self))
        for path in make_adapter(self.adapter, self.adapter_options).side_files():
            values[f"side_files.{path.name}"] = InputFile(path).identify().hash
        return values


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves.update(flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return leaves


def hash_of(value: object) -> str:
    """XXH3-128 of a JSON value, whatever the order of its keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode("ascii"))


def differences(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """`name: recorded here, asked there` for each option that is not the same."""
    names = sorted(recorded.keys() | asked.keys())
    return [
        f"{name}: {recorded.get(name)!r} there, {asked.get(name)!r} now"
        for name in names
        if recorded.get(name) != asked.get(name)
    ]
