"""Where in a ZeRO checkpoint's flat tensors each parameter lies, for one tensor-parallel rank.

Stages 1 and 2 lay the parameters of a group end to end and cut the line into one part per rank. Stage 3 cuts every
parameter into one part per rank, rounded up, and lays a rank's parts of a sub-group end to end.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rae_scale.convert.deepspeed_states import ModelFile, OptimFile
from rae_scale.convert.stored import StoredTensor, runs
from rae_scale.engines.base import Kind
from rae_scale.engines.shards import MOMENTS
from rae_scale.parallel.boxes import Box
from rae_scale.state.format import CheckpointError

ALIGNMENT = 2  # stages 1 and 2 round a group up to a multiple of this times the ranks
MIXED = "its files are of two checkpoints; fetch all of one into an empty folder"


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of a flattened parameter are those of the flat `tensor` from number `offset` on."""

    start: int
    stop: int
    tensor: StoredTensor
    offset: int


@dataclass(frozen=True)
class Pieces:
    """A tensor in consecutive pieces."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Sequence[Piece]

    def read(self, box: Box) -> Tensor:
        """The elements in `box`, contiguous."""
        out = torch.empty(box.shape, dtype=self.dtype)
        if not out.numel():
            return out
        ends = [piece.stop for piece in self.pieces]
        for start, flat in runs(self.shape, box, out.view(-1)):
            position, stop = start, start + flat.numel()
            for piece in self.pieces[bisect_right(ends, start) :]:
                if position == stop:
                    break
                end = min(stop, piece.stop)
                piece.tensor.read_flat(piece.offset + position - piece.start, flat[position - start : end - start])
                position = end
        return out


Shapes = dict[str, tuple[int, ...]]
Found = dict[Kind, dict[str, Pieces]]


def tensors_of(optim: Sequence[OptimFile], models: Sequence[ModelFile], shared: Mapping[str, str]) -> Found:
    """Everything that the data-parallel ranks of one tensor-parallel rank hold, by kind and name.

    shared: further names of parameters, which are left out.

    Raises:
        CheckpointError: the flat tensors have not the sizes that the parameters' shapes make.
    """
    model, stage = models[0], optim[0].stage
    held: dict[Kind, list[list[StoredTensor]]] = {"weight": [entry.flats for entry in optim]}
    for kind in MOMENTS:
        if optim[0].states and all(kind in state for entry in optim for state in entry.states):
            held[kind] = [[state[kind] for state in entry.states] for entry in optim]
    found: Found = {}
    for kind, of_ranks in held.items():
        where = f"{optim[0].file.path.parent}: {kind}"
        if any(len(flats) != len(model.groups) for flats in of_ranks):
            raise CheckpointError(f"{where} has {len(of_ranks[0])} groups, param_shapes {len(model.groups)}; {MIXED}")
        found[kind] = {}
        for number, (shapes, parts) in enumerate(zip(model.groups, zip(*of_ranks, strict=True), strict=True)):
            paddings = optim[0].paddings[number] if optim[0].paddings else [0] * len(shapes)
            where_group = f"{where}, group {number}"
            lay = (
                lay_stage3(shapes, parts, where_group) if stage == 3 else lay_line(shapes, parts, paddings, where_group)
            )
            found[kind] |= lay
    return {**found, "weight": {**found["weight"], **frozen_of(models, stage, shared), **buffers_of(model)}}


def lay_line(shapes: Shapes, parts: Sequence[StoredTensor], paddings: Sequence[int], where: str) -> dict[str, Pieces]:
    """Stages 1 and 2. What fills the line up, to divide by the ranks, is saved with moments, not with weights."""
    starts = list(itertools.accumulate((part.numel for part in parts), initial=0))
    position, found = 0, {}
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        stop = position + math.prod(shape)
        pieces = [
            Piece(max(first, position) - position, min(last, stop) - position, part, max(position - first, 0))
            for part, first, last in zip(parts, starts, starts[1:], strict=False)
            if first < stop and last > position
        ]
        found[name] = Pieces(shape, parts[0].dtype, pieces)
        position = stop + padding
    if not 0 <= starts[-1] - position < ALIGNMENT * len(parts):
        raise CheckpointError(f"{where} has {starts[-1]} elements, and its parameters {position}; {MIXED}")
    return found


def lay_stage3(shapes: Shapes, parts: Sequence[StoredTensor], where: str) -> dict[str, Pieces]:
    offset, found = 0, {}
    for name, shape in shapes.items():
        found[name] = in_parts(shape, parts, offset)
        offset += part_length(shape, len(parts))
    for part in parts:
        if part.numel != offset:
            raise CheckpointError(f"{where} has {part.numel} elements per rank, and its parameters {offset}; {MIXED}")
    return found


def part_length(shape: Sequence[int], count: int) -> int:
    return -(-math.prod(shape) // count)


def in_parts(shape: tuple[int, ...], parts: Sequence[StoredTensor], offset: int) -> Pieces:
    """A parameter of which every rank holds an equal part; the last ones have less of it, or nothing."""
    numel, length = math.prod(shape), part_length(shape, len(parts))
    ends = [min(rank * length, numel) for rank in range(len(parts) + 1)]
    pieces = [
        Piece(start, stop, part, offset)
        for start, stop, part in zip(ends, ends[1:], parts, strict=False)
        if start < stop
    ]
    return Pieces(shape, parts[0].dtype, pieces)


def frozen_of(models: Sequence[ModelFile], stage: int, shared: Mapping[str, str]) -> dict[str, Pieces]:
    """The parameters that do not train. Stage 1 saves them in the state dict alone."""
    model, found = models[0], {}
    if model.frozen is None:
        trained = {name for shapes in model.groups for name in shapes}
        rest = model.module.keys() - trained - shared.keys() if stage < 3 else ()
        return {name: in_one_piece(model.module[name]) for name in model.module if name in rest}
    for name, (shape, whole) in model.frozen.items():
        parts = [entry.frozen[name][1] for entry in models if entry.frozen is not None]
        wanted = part_length(shape, len(parts)) if stage == 3 else math.prod(shape)
        if whole.numel != wanted:
            raise CheckpointError(f"{model.file.path}: {name} {list(shape)} has {whole.numel} elements; {MIXED}")
        found[name] = in_parts(shape, parts, 0) if stage == 3 else in_one_piece(whole)
    return found


def buffers_of(model: ModelFile) -> dict[str, Pieces]:
    return {name: in_one_piece(model.module[name]) for name in model.buffers if name in model.module}


def in_one_piece(tensor: StoredTensor) -> Pieces:
    return Pieces(tensor.shape, tensor.dtype, [Piece(0, tensor.numel, tensor, 0)] if tensor.numel else [])
