"""A source of any format, seen under our names: whoever writes another format reads our tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from rae_scale.convert.names import Target, in_ours, in_target, is_beside, join, patches_by_name, table
from rae_scale.convert.source import Facts, Form, Naming, Source
from rae_scale.engines.base import Kind
from rae_scale.models.official import CONSTANT_TOLERANCE, MOST_LISTED
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state.format import CheckpointError
from rae_scale.state.read import CHUNK_BYTES, chunks_of
from rae_scale.state.weights import WeightKind


def in_our_names(source: Source, module: nn.Module) -> Source:
    """`source` under our names, checked against the model `module` (which may be on the meta device): every tensor
    that its format has for this model is there, in the right shape, and no other.

    Raises:
        CheckpointError: lists every tensor that is missing, unknown or of another shape.
    """
    if source.naming == "native":
        check_tensors(source, table("native", module))
        return source
    return OurNames(source, module)


class OurNames:
    """`Source` in our names of one in another format's. Padding reads as zero."""

    naming: Naming = "native"

    def __init__(self, source: Source, module: nn.Module) -> None:
        self.source, self.what = source, source.what
        self.facts: Facts = source.facts
        self.targets = table(source.naming, module)
        check_tensors(source, self.targets)
        self.places = patches_by_name(self.targets)
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self.forms: dict[Kind, dict[str, Form]] = {}
        for kind, theirs in source.forms.items():
            self.forms[kind] = {
                name: Form(shapes[name], theirs[places[0][0].name].dtype)
                for name, places in self.places.items()
                if all(target.name in theirs for target, _ in places)
            }

    def read(self, kind: Kind, name: str, box: Box) -> Tensor:
        parts = []
        for target, patch in self.places[name]:
            common = patch.ours.intersect(box)
            if common is not None:
                found = self.source.read(kind, target.name, in_target(patch, common))
                parts.append((common, found.reshape(common.shape)))
        return join(box, parts)

    def check(self) -> None:
        self.source.check()
        for target in self.targets:
            if target.repeats:
                for kind in self.forms:
                    self.check_repeated(kind, target)

    def check_repeated(self, kind: Kind, target: Target) -> None:
        """A tensor that is there twice must be the same both times."""
        theirs = self.source.forms[kind]
        if target.name in theirs:
            for chunk in chunks_of(whole(target.shape), CHUNK_BYTES // theirs[target.name].dtype.itemsize):
                second = self.source.read(kind, target.name, chunk)
                for patch in target.patches:
                    common = patch.box.intersect(chunk)
                    if common is None:
                        continue
                    first = self.read(kind, patch.name, in_ours(patch, common))
                    if not torch.equal(first, second[common.relative_to(chunk).slices].reshape(first.shape)):
                        raise CheckpointError(
                            f"{self.what}: {target.name} differs from {self.places[patch.name][0][0].name}, but this "
                            "model ties the two; give the settings of a model that does not (--config)"
                        )

    def __enter__(self) -> OurNames:
        self.source.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.__exit__(kind, error, trace)


def check_tensors(source: Source, targets: Sequence[Target]) -> None:
    """The source's weights are the targets, and what it has of other kinds is of the same names and shapes."""
    by_name = {target.name: target for target in targets}
    weights = source.forms.get("weight", {})
    problems = [
        f"{target.name} {list(target.shape)} is missing"
        for target in targets
        if target.name not in weights and not target.repeats and not target.optional
    ]
    for kind, forms in source.forms.items():
        of = "" if kind == "weight" else f"{kind} of "
        for name, form in forms.items():
            if name not in by_name:
                if not is_beside(source.naming, name):
                    problems.append(f"{of}{name} {list(form.shape)} is not part of this model")
            elif form.shape != by_name[name].shape:
                wanted = list(by_name[name].shape)
                problems.append(f"{of}{name} is {list(form.shape)} there, {wanted} in this model")
            elif kind == "weight" and not constant_fits(source, by_name[name]):
                problems.append(f"{name} differs from the fixed table that this model uses")
    if problems:
        listed = problems[:MOST_LISTED]
        if len(problems) > len(listed):
            listed.append(f"and {len(problems) - len(listed)} more")
        raise CheckpointError(
            f"{source.what} does not hold the model of its settings:\n  "
            + "\n  ".join(listed)
            + "\n"
            + (
                "merge the adapter into its weights: --lora FOLDER"
                if any(".lora_" in line for line in problems)
                else "give the settings that it was trained with (--config), or the whole checkpoint"
            )
        )


def constant_fits(source: Source, target: Target) -> bool:
    if target.constant is None:
        return True
    found = source.read("weight", target.name, whole(target.shape)).float()
    return bool((found - target.constant).abs().max() <= CONSTANT_TOLERANCE)


class Chosen:
    """`Source`: of one in our names, one kind of weights, and perhaps only a part of them, as kind "weight".

    kind: "ema" takes the moving average, and the weight of what is frozen, which is its own average.
    only: beginnings of names.
    """

    naming: Naming = "native"

    def __init__(self, source: Source, kind: WeightKind, only: tuple[str, ...] | None) -> None:
        self.source, self.what, self.facts = source, source.what, source.facts
        averages = source.forms.get("ema", {}) if kind == "ema" else {}
        self.kinds: dict[str, Kind] = {}
        chosen = {}
        for name, form in source.forms["weight"].items():
            if only is None or name.startswith(only):
                self.kinds[name] = "ema" if name in averages else "weight"
                chosen[name] = averages.get(name, form)
        if not chosen:
            raise CheckpointError(f"{source.what}: no tensor's name begins with any of {list(only or ())}")
        self.forms: dict[Kind, dict[str, Form]] = {"weight": chosen}

    def read(self, kind: Kind, name: str, box: Box) -> Tensor:
        assert kind == "weight"
        return self.source.read(self.kinds[name], name, box)

    def check(self) -> None:
        self.source.check()

    def __enter__(self) -> Chosen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.__exit__(kind, error, trace)
