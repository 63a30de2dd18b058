"""What every format is to the conversion: named tensors of known form, of which any box can be read.

Nothing here holds a model. A source's names are those of its format (`Naming`); `rae_scale/convert/names.py` says where
in our tensors each of them lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rae_scale.engines.base import Kind
from rae_scale.parallel.boxes import Box
from rae_scale.state.weights import WeightKind

Naming = Literal["native", "official", "official-decoder", "diffusers-decoder", "llm"]
"""Whose names and shapes: ours; the Scale-RAE release's; the RAE decoder's; diffusers' AutoencoderRAE's; a bare
Qwen2's as transformers spells it."""


@dataclass(frozen=True)
class Form:
    """shape: of the whole tensor, tensor-parallel parts merged, padding as the format has it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Facts:
    """What a source knows beside its tensors. None where its format does not say.

    config:  our settings, as a tree (`rae_scale.config.parse_config` reads it).
    foreign: the format's own settings, such as the config.json beside official weights.
    step:    how many steps were trained.
    weights: which weights its kind "weight" is: the raw ones, or their moving average alone.
    state:   what the training loop had put beside the tensors, as `state.read_state` returns it.
    """

    config: Mapping[str, Any] | None = None
    foreign: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    optimizer_step: int | None = None
    weights: WeightKind | None = None
    state: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """An open folder or file of one format. Opening it checks what can be checked without reading the tensors.

    Reading is cheap in memory: a box costs its own size and little more, wherever in however large a file it lies.
    """

    what: str
    """For messages: format and path, as in "DeepSpeed ZeRO-3 checkpoint runs/x/global_step10"."""
    naming: Naming
    facts: Facts

    @property
    def forms(self) -> Mapping[Kind, Mapping[str, Form]]:
        """Every tensor there is, by kind and name: "weight" always, "ema", "exp_avg" and "exp_avg_sq" where kept."""
        ...

    def read(self, kind: Kind, name: str, box: Box) -> Tensor:
        """The elements in `box`, in the stored dtype, contiguous and of the box's shape.

        Raises:
            CheckpointError: the file is damaged there. KeyError: there is no such tensor.
        """
        ...

    def check(self) -> None:
        """Compare with its hash everything that has one. Whatever `read` could hash in passing is not read again, so
        this comes last where a large source is to be read once.

        Raises:
            CheckpointError: every file that differs or is missing.
        """
        ...

    def __enter__(self) -> Source: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
