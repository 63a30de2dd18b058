"""Sources in DeepSpeed's own checkpoints, of ZeRO stages 1, 2 and 3, with or without tensor parallelism.

What is read is what training continues from: the float32 weights of the optimizer, its moments, frozen parameters and
buffers. Tensor-parallel parts are merged by our shard tables, so they have to be of our model: the files say nothing of
how a tensor was split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from rae_scale.convert.deepspeed_files import find_tag, open_files, optimizer_step
from rae_scale.convert.deepspeed_layout import MIXED, Found, Pieces, tensors_of
from rae_scale.convert.recognise import naming_of
from rae_scale.convert.records import check_all
from rae_scale.convert.source import Facts, Form, Naming
from rae_scale.engines.base import Kind
from rae_scale.infer.published import CONFIG_JSON
from rae_scale.models.shard_tables import SCALE_RAE, rule_of
from rae_scale.parallel.boxes import Box, whole
from rae_scale.parallel.placement import Placement
from rae_scale.state.format import CheckpointError, read_json
from rae_scale.state.read import CHUNK_BYTES, chunks_of

MODULE = "module."
"""What a wrapper around the model puts before every name."""


@dataclass(frozen=True)
class Parts:
    """A logical tensor in the parts that tensor-parallel ranks hold, with where each of them lies in it."""

    shape: tuple[int, ...]
    parts: Sequence[tuple[Pieces, Placement]]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0][0].dtype

    @property
    def is_split(self) -> bool:
        return self.parts[0][1].is_split

    def read(self, box: Box) -> Tensor:
        pieces, placement = self.parts[0]
        if not placement.is_split:
            return pieces.read(box)
        out = torch.empty(box.shape, dtype=self.dtype)
        for pieces, placement in self.parts:
            for local, logical in placement.parts:
                common = logical.intersect(box)
                if common is not None:
                    found = pieces.read(common.relative_to(logical).placed_in(local))
                    out[common.relative_to(box).slices] = found
        return out


class DeepSpeedSource:
    """`Source`: a folder that `DeepSpeedEngine.save_checkpoint` wrote."""

    def __init__(self, folder: Path, foreign: Mapping[str, Any]) -> None:
        self.files = open_files(folder)
        self.what = f"DeepSpeed ZeRO-{self.files.stage} checkpoint {folder}"
        shared = self.files.shared
        ranks = [tensors_of(*row, shared) for row in zip(self.files.optim, self.files.models, strict=True)]
        ranks = [without_prefix(rank) for rank in ranks]
        self.naming: Naming = naming_of(foreign, ranks[0]["weight"], self.what)
        if self.naming != "native" and len(ranks) > 1:
            raise CheckpointError(
                f"{self.what} is of {len(ranks)} tensor-parallel ranks and not of our model: nothing says how its "
                "tensors are split; merge them with the program that wrote it"
            )
        self.tensors: dict[Kind, dict[str, Parts]] = {kind: merged(ranks, kind, self.what) for kind in ranks[0]}
        if self.naming != "native":  # ours are names of parameters, and each has one
            weights = self.tensors["weight"]
            for name, owner in shared.items():
                if (owner := owner.removeprefix(MODULE)) in weights:
                    weights[name.removeprefix(MODULE)] = weights[owner]
        self.forms: dict[Kind, dict[str, Form]] = {
            kind: {name: Form(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            for kind, tensors in self.tensors.items()
        }
        self.facts = Facts(
            foreign=foreign,
            step=self.files.models[0][0].step,
            optimizer_step=optimizer_step(self.files),
            weights="weight",
        )

    def read(self, kind: Kind, name: str, box: Box) -> Tensor:
        return self.tensors[kind][name].read(box)

    def check(self) -> None:
        """Every byte against the checksums that torch wrote, and tensors that tensor-parallel ranks hold whole against
        each other.

        Raises:
            CheckpointError: names the file, or the tensor.
        """
        check_all(record for file in self.files.all for record in file.all_records)
        for tensors in self.tensors.values():
            for name, tensor in tensors.items():
                if len(tensor.parts) > 1 and not tensor.is_split:
                    self.check_copies(name, tensor)

    def check_copies(self, name: str, tensor: Parts) -> None:
        for box in chunks_of(whole(tensor.shape), CHUNK_BYTES // tensor.dtype.itemsize):
            first = tensor.read(box)
            for rank, (pieces, _) in enumerate(tensor.parts):
                if not torch.equal(first, pieces.read(box)):
                    raise CheckpointError(
                        f"{self.what}: {name} of tensor-parallel rank {rank} differs from rank 0's, though every rank "
                        "holds all of it: files of two checkpoints, or ranks that had drifted apart; use another one"
                    )

    def __enter__(self) -> DeepSpeedSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files.all:
            file.close()


def without_prefix(rank: Found) -> Found:
    """Without what a wrapper around the whole model puts before every name."""
    if not all(name.startswith(MODULE) for name in rank["weight"]):
        return rank
    return {kind: {name.removeprefix(MODULE): t for name, t in tensors.items()} for kind, tensors in rank.items()}


def merged(ranks: Sequence[Found], kind: Kind, what: str) -> dict[str, Parts]:
    """One kind of tensors of all tensor-parallel ranks.

    Raises:
        CheckpointError: the ranks do not hold parts of the same tensors.
    """
    for rank in ranks:
        if differing := rank.get(kind, {}).keys() ^ ranks[0][kind].keys():
            raise CheckpointError(f"{what}: not all tensor-parallel ranks have {kind} of {min(differing)}; {MIXED}")
    if len(ranks) == 1:
        return {name: Parts(t.shape, [(t, Placement(t.shape))]) for name, t in ranks[0][kind].items()}
    return {name: merge(name, [rank[kind][name] for rank in ranks], what) for name in ranks[0][kind]}


def merge(name: str, pieces: Sequence[Pieces], what: str) -> Parts:
    """The logical tensor whose parts the tensor-parallel ranks hold, as our shard tables split it."""
    rule = rule_of(name, SCALE_RAE)
    if rule is None or rule.kind == "buffer":
        raise CheckpointError(f"{what}: {name} is no parameter of our model, so its parts cannot be merged")
    dim = rule.split_dim(name.rpartition(".")[2])
    shape = list(pieces[0].shape)
    if dim is not None:
        shape[dim] = sum(part.shape[dim] for part in pieces)
    parts = [(part, Placement(tuple(shape), dim, rule.groups, index, len(pieces))) for index, part in enumerate(pieces)]
    for part, placement in parts:
        if part.shape != placement.local_shape:
            found = ", ".join(str(list(part.shape)) for part in pieces)
            raise CheckpointError(f"{what}: {name} is {found} on the tensor-parallel ranks, which is no split of ours")
    return Parts(tuple(shape), parts)


def open_deepspeed(path: Path) -> DeepSpeedSource:
    """path: a tag's folder, or the one that holds `latest`, where other programs also put the model's config.json."""
    config = path / CONFIG_JSON
    return DeepSpeedSource(find_tag(path), read_json(config) if config.is_file() else {})
