"""What a conversion can write. A sink says which tensors go into which files; `convert.convert` reads, casts, writes.

    class MySink:                                     # rae_scale/convert/sinks/my.py, registered in SINKS
        naming, everything = "official", False
        def plan(self, job: Job) -> Plan:
            entries = job.entries(table("official", job.module))
            return Plan([TensorFile("model.safetensors", entries, {"format": "pt"})], complete, remarks)

A sink sees tensors under our names only (`job.source`). It refuses in `plan` what its format cannot hold: nothing is
written before that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from rae_scale.config import Config
from rae_scale.convert.names import Target
from rae_scale.convert.settings import Settings
from rae_scale.convert.source import Facts, Naming, Source
from rae_scale.convert.writer import WriteFile
from rae_scale.engines.base import Kind
from rae_scale.state.format import CheckpointError
from rae_scale.state.weights import WeightKind

To = Literal["native", "checkpoint", "official", "official-consolidated", "official-decoder", "hf", "diffusers-decoder"]

SHARD_BYTES = 5 << 30  # the size of files that the hub's tools write


@dataclass(frozen=True)
class Entry:
    """One tensor of the destination, made of ours of this kind."""

    key: str
    kind: Kind
    target: Target
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.target.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFile:
    """name: its path in the destination. metadata: of a safetensors file. write: what writes another format, None for
    safetensors."""

    name: str
    entries: Sequence[Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    write: WriteFile | None = None


Complete = Callable[[Path, Mapping[str, str]], None]
"""(folder, xxh3-128 of every tensor file) -> None: writes everything but the tensor files, `manifest.json` included."""


@dataclass(frozen=True)
class Plan:
    """remarks: what the user is to know, such as what the format has no place for."""

    files: Sequence[TensorFile]
    complete: Complete
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Job:
    """What a sink knows.

    source:  tensors in our names; of kind "weight" only unless the sink keeps everything, and then those chosen, with
             adapters merged.
    facts:   what the source knew beside them.
    weights: which weights these are: "ema" or "weight"; None where the source does not say.
    dtype:   what to write.
    only:    beginnings of the names to write; None: all.
    decoder: the decoder to go with a text-to-image model; None: that of the settings.
    out:     where the folder will be.
    license: of the weights, as the user states it, for the model card; None: not stated.
    """

    source: Source
    facts: Facts
    settings: Settings
    weights: WeightKind | None
    dtype: torch.dtype
    out: Path
    only: tuple[str, ...] | None = None
    decoder: Path | None = None
    license: str | None = None

    @property
    def config(self) -> Config:
        """Our settings.

        Raises:
            ValueError: neither the source nor the user gave any.
        """
        return self.settings.config

    @property
    def module(self) -> nn.Module:
        """The model of these settings, on the meta device."""
        return self.settings.module

    @property
    def metadata(self) -> dict[str, str]:
        """Of safetensors files under our names: which weights they hold, and of which step."""
        known = {"kind": self.weights, "step": self.facts.step}
        return {"format": "pt", **{key: str(value) for key, value in known.items() if value is not None}}

    def entries(self, targets: Iterable[Target]) -> list[Entry]:
        """The tensors to write in a format of weights alone."""
        return [Entry(target.name, "weight", target, self.dtype) for target in targets if not target.optional]

    def whole_model(self, what: str) -> None:
        """Raise CheckpointError if only parts are asked for, which the format `what` cannot say."""
        if self.only is not None:
            raise CheckpointError(f"--only {' --only '.join(self.only)}: {what} holds a whole model; use --to native")


class Sink(Protocol):
    naming: Naming
    """Whose names the destination has: `open_source` of it says the same."""
    everything: bool
    """Whether it keeps optimizer state and both kinds of weights."""

    def plan(self, job: Job) -> Plan:
        """What to write.

        Raises:
            ValueError: the format cannot hold this model, or something it needs is missing. Lists all of it.
        """
        ...


SINKS: Mapping[To, str] = {
    "native": "native:NativeSink",
    "checkpoint": "checkpoint:CheckpointSink",
    "official": "official:OfficialSink",
    "official-consolidated": "official:ConsolidatedSink",
    "official-decoder": "official_decoder:OfficialDecoderSink",
    "hf": "hf:HFSink",
    "diffusers-decoder": "diffusers_decoder:DiffusersDecoderSink",
}


def sink_of(to: To) -> Sink:
    module, _, name = SINKS[to].partition(":")
    sink: Sink = getattr(import_module(f"{__name__}.{module}"), name)()
    return sink


def shards(entries: Sequence[Entry], size: int = SHARD_BYTES) -> Iterator[list[Entry]]:
    """The entries in order, in groups of at most `size` bytes or of one tensor."""
    group: list[Entry] = []
    for entry in entries:
        if group and sum(other.bytes for other in group) + entry.bytes > size:
            yield group
            group = []
        group.append(entry)
    if group:
        yield group
