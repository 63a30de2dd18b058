"""Adapters of low rank (Hu et al. 2021), as the PEFT library writes them, merged into the language model's weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from rae_scale.convert.names import LLM_PREFIX
from rae_scale.convert.source import Form, Naming, Source
from rae_scale.convert.tensor_files import TensorFiles, read_header
from rae_scale.engines.base import Kind
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state.format import CheckpointError, read_json

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADDED_PREFIX = "base_model.model."
PART = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
ROWS = 256  # of a product computed at a time, whichever of them are asked for: the same bits for every box

# Settings that change what an adapter means, and the value with which they do not.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "lora_bias": (False, None),
}


@dataclass(frozen=True)
class Change:
    """What is added to a weight [out, in]: scale * up @ down, or its transpose.

    up: [out, r], down: [r, in], float32; with `transposed` [in, r] and [r, out], for layers that keep [in, out].
    """

    up: Tensor
    down: Tensor
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = len(self.up), self.down.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self, box: Box) -> Tensor:
        """The elements in `box`, float32."""
        (first, left), (last, right) = box.start, box.stop
        up, down = (self.down.t(), self.up.t()) if self.transposed else (self.up, self.down)
        begin = first // ROWS * ROWS
        blocks = [up[row : row + ROWS] @ down for row in range(begin, last, ROWS)]
        return self.scale * torch.cat(blocks)[first - begin : last - begin, left:right]


def read_adapter(folder: Path, module: nn.Module) -> dict[str, Change]:
    """What the adapter in `folder` adds to which of `module`'s parameters.

    Raises:
        CheckpointError: it is no LoRA of this language model, or part of it would not be merged.
    """
    settings = read_json(folder / SETTINGS)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder / WEIGHTS} does not exist: save the adapter with PEFT's save_pretrained")
    for name, neutral in NEUTRAL.items():
        if name in settings and settings[name] not in neutral:
            raise CheckpointError(
                f"{folder / SETTINGS}: {name}={settings[name]!r}; plain LoRA ({name}={neutral[0]!r}) is merged here; "
                "merge this one with PEFT (merge_and_unload)"
            )
    files = TensorFiles([read_header(folder / WEIGHTS)])
    sides, unmerged = split_sides(files)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    changes = {}
    for layer, pair in sides.items():
        name = f"{LLM_PREFIX}{layer}.weight"
        if set(pair) != {"A", "B"} or name not in shapes or not is_meant(layer, settings.get("target_modules")):
            unmerged += [f"{layer}.lora_{side}" for side in pair]
            continue
        change = Change(pair["B"], pair["A"], scale_of(settings, len(pair["A"])), bool(settings.get("fan_in_fan_out")))
        if change.shape != shapes[name] or len(pair["A"]) != pair["B"].shape[1]:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {layer} has lora_A {list(pair['A'].shape)} and lora_B {list(pair['B'].shape)}, "
                f"and {name} is {list(shapes[name])}; it is an adapter of another model"
            )
        changes[name] = change
    if unmerged or not changes:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {', '.join(sorted(unmerged)[:10]) or 'nothing in it'} cannot be merged: only lora_A "
            "and lora_B of the language model's linear layers that target_modules names can (a tied lm_head is no "
            "layer of its own)"
        )
    return changes


def split_sides(files: TensorFiles) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """layer -> {"A": tensor, "B": tensor}, float32, and the names that are no side of a layer."""
    sides: dict[str, dict[str, Tensor]] = {}
    others = []
    for name, form in files.forms.items():
        match = PART.fullmatch(name.removeprefix(ADDED_PREFIX))
        if match is None or len(form.shape) != 2:
            others.append(name)
        else:
            tensor = files.read(name, whole(form.shape)).float()
            sides.setdefault(match["layer"], {})[match["side"]] = tensor
    files.close()
    return sides, others


def is_meant(layer: str, target_modules: Any) -> bool:
    """Whether `target_modules`, a list of endings or a pattern, names the layer."""
    if isinstance(target_modules, str):
        return target_modules == "all-linear" or re.fullmatch(target_modules, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in target_modules or ())


def scale_of(settings: Mapping[str, Any], rank: int) -> float:
    if settings.get("r") != rank:
        raise CheckpointError(
            f"{SETTINGS}: r={settings.get('r')}, and the tensors are of rank {rank}: two adapters are mixed"
        )
    alpha = float(settings.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


class Merged:
    """`Source` in our names whose weights have an adapter added, in float32."""

    naming: Naming = "native"

    def __init__(self, source: Source, changes: Mapping[str, Change]) -> None:
        self.source, self.what, self.facts = source, source.what, source.facts
        self.changes = changes
        missing = sorted(changes.keys() - source.forms["weight"].keys())
        if missing:
            raise CheckpointError(f"{source.what} lacks {missing[0]}, which the adapter changes; convert all of it")
        weights = {
            name: replace(form, dtype=torch.float32) if name in changes else form
            for name, form in source.forms["weight"].items()
        }
        self.forms: dict[Kind, dict[str, Form]] = {"weight": weights}

    def read(self, kind: Kind, name: str, box: Box) -> Tensor:
        found = self.source.read(kind, name, box)
        return found.float() + self.changes[name].read(box) if name in self.changes else found

    def check(self) -> None:
        self.source.check()

    def __enter__(self) -> Merged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.__exit__(kind, error, trace)
