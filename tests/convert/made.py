"""Checkpoints that conversions are tried on: every kind of tensor, none like another, in many pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rae_scale.config import Config
from rae_scale.convert.source import Facts, Form, Naming
from rae_scale.engines import Engine, Piece
from rae_scale.engines.base import Kind
from rae_scale.models.blocks import SwiGLU
from rae_scale.parallel import Mesh
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state import save_checkpoint
from rae_scale.train.parts import build_parts
from rae_scale.train.resume import identity

CPU = torch.device("cpu")
STEP, OPTIMIZER_STEP = 7, 5
GROUPS = {"final.adaln": 2, "qkv": 3, "w12": 2, "adaln": 6}
"""Tensors packed along the first dimension, each of which tensor parallelism splits."""


def filled(module: nn.Module) -> nn.Module:
    """Random weights everywhere but in the padding, which training leaves at zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for part in module.modules():
            if isinstance(part, SwiGLU):
                part.zero_padding()
    return module


def save_made(config: Config, module: nn.Module | None = None) -> Path:
    """A run folder with one checkpoint of the stage's model, as two tensor-parallel ranks cut it."""
    module = module or filled(build_parts(config, CPU).stage.module)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    engine = SimpleNamespace(
        shapes={name: tuple(tensor.shape) for name, tensor in parameters.items()},
        optimizer_step=OPTIMIZER_STEP,
        pieces=lambda: pieces(parameters),
    )
    extra: dict[str, Any] = {"config": config.model_dump(mode="json"), "skipped": 0, "identity": identity(config)}
    save_checkpoint(config.run.dir, STEP, cast(Engine, engine), Mesh(CPU), extra, keep_last=1)
    return Path(config.run.dir)


def pieces(parameters: dict[str, Tensor]) -> Iterator[Piece]:
    for name, tensor in parameters.items():
        kinds: dict[Kind, Tensor] = {
            "weight": tensor,
            "ema": 0.9 * tensor,
            "exp_avg": -0.01 * tensor,
            "exp_avg_sq": tensor.square(),
        }
        for kind, values in kinds.items():
            for box in boxes(name, tuple(tensor.shape)):
                yield Piece(kind, name, tuple(tensor.shape), box, values[box.slices])


def boxes(name: str, shape: tuple[int, ...]) -> list[Box]:
    """Two parts of every packed tensor, as two tensor-parallel ranks hold them."""
    groups = next((count for layer, count in GROUPS.items() if f".{layer}." in name), 0)
    if not groups:
        return [whole(shape)]
    rows = shape[0] // (2 * groups)
    rest = whole(shape[1:])
    return [Box((first, *rest.start), (first + rows, *rest.stop)) for first in range(0, shape[0], rows)]


class MemorySource:
    """`Source` of tensors at hand."""

    what = "tensors in memory"

    def __init__(self, naming: Naming, tensors: Mapping[str, Tensor], facts: Facts | None = None) -> None:
        self.naming, self.tensors, self.facts = naming, tensors, facts or Facts()
        self.forms: dict[Kind, dict[str, Form]] = {
            "weight": {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        }

    def read(self, kind: Kind, name: str, box: Box) -> Tensor:
        assert kind == "weight"
        return self.tensors[name][box.slices].clone()

    def check(self) -> None:
        pass

    def __enter__(self) -> MemorySource:
        return self

    def __exit__(self, *error: object) -> None:
        pass
