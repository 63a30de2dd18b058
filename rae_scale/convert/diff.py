"""Two checkpoints of any formats, compared tensor by tensor, a part of one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rae_scale.config import Config
from rae_scale.convert.open import open_source
from rae_scale.convert.ours import Chosen, in_our_names
from rae_scale.convert.settings import Settings
from rae_scale.convert.source import Form, Source
from rae_scale.convert.verify import differing_bits
from rae_scale.engines.base import Kind
from rae_scale.parallel.boxes import whole
from rae_scale.state.format import CheckpointError
from rae_scale.state.read import chunks_of

CHUNK_ELEMENTS = 4 << 20  # of each of the two; their difference takes several times that


@dataclass(frozen=True)
class Difference:
    """Of one tensor. a, b: its form on either side, None where it is missing.

    elements:     that are not the same: bit for bit, or by value where the dtypes differ; None where there is nothing
                  to compare.
    max_absolute: largest difference. max_relative: that over the largest entry in `a`. NaN where a side is not finite.
    """

    kind: Kind
    name: str
    a: Form | None
    b: Form | None
    elements: int | None = None
    max_absolute: float = 0.0
    max_relative: float = 0.0

    @property
    def numel(self) -> int:
        form = self.a or self.b
        return whole(form.shape).numel if form is not None else 0

    def __str__(self) -> str:
        what = f"{self.kind} of {self.name}"
        if self.a is None or self.b is None:
            form, where = (self.b, "A") if self.a is None else (self.a, "B")
            assert form is not None
            return f"{what} {list(form.shape)}: not in {where}"
        if self.elements is None:
            return f"{what}: shape {list(self.a.shape)} in A, {list(self.b.shape)} in B"
        dtypes = "" if self.a.dtype == self.b.dtype else f"{dtype_name(self.a)} in A, {dtype_name(self.b)} in B; "
        return (
            f"{what} {list(self.a.shape)}: {dtypes}{self.elements:,} of {whole(self.a.shape).numel:,} elements differ, "
            f"by at most {self.max_absolute:.3g} ({self.max_relative:.3g} of the largest entry)"
        )


def dtype_name(form: Form) -> str:
    return str(form.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Comparison:
    """tensors: how many were compared, over all kinds. remarks: which kinds only one side has."""

    kinds: Sequence[Kind]
    tensors: int
    elements: int
    differences: Sequence[Difference]
    remarks: Sequence[str]


def diff(
    a: str | Path, b: str | Path, *, kinds: Sequence[Kind] | None = None, config: Config | None = None
) -> Comparison:
    """Compare two checkpoints, of whatever formats.

    Of one format, tensors are compared under its names. Of two, under ours, for which the settings of one of them, or
    `config`, are needed.
    kinds: which to compare; None: those that both have.

    Raises:
        ValueError: one cannot be read, or lacks a kind that is asked for; or they are of models that differ in form.
    """
    with open_source(a) as first, open_source(b) as second:
        if first.naming != second.naming:
            first, second = both_in_our_names(first, second, Path(a), Path(b), config)
        remarks: list[str] = []
        if kinds is None:
            first, second = same_weights(first, second, remarks), same_weights(second, first, remarks)
        common = [kind for kind in first.forms if kind in second.forms]
        for kind in kinds or ():
            for source in (first, second):
                if kind not in source.forms:
                    raise CheckpointError(f"{source.what} has no {kind}; it has {', '.join(source.forms)}")
        remarks += [
            f"only {source.what} has {', '.join(sorted(only))}"
            for source, other in ((first, second), (second, first))
            if (only := source.forms.keys() - other.forms.keys()) and kinds is None
        ]
        chosen = list(kinds or common)
        found = [tensor for kind in chosen for tensor in compare_kind(first, second, kind)]
        return Comparison(
            kinds=chosen,
            tensors=len(found),
            elements=sum(each.numel for each in found),
            differences=[each for each in found if is_different(each)],
            remarks=remarks,
        )


def same_weights(source: Source, other: Source, remarks: list[str]) -> Source:
    """`source`, or its moving average alone if that is all that `other` has."""
    if other.facts.weights != "ema" or "ema" in other.forms or source.facts.weights == "ema":
        return source
    if "ema" not in source.forms:
        remarks.append(f"{other.what} holds the moving average of the weights, {source.what} may not")
        return source
    remarks.append(f"of {source.what} the moving average is compared, which is all that {other.what} has")
    return Chosen(source, "ema", None)


def both_in_our_names(first: Source, second: Source, a: Path, b: Path, config: Config | None) -> tuple[Source, Source]:
    """The model is that of the side which has our settings, or describes its own."""
    sides = sorted(((first, a), (second, b)), key=lambda side: side[0].facts.config is None)
    problems = []
    for source, path in sides:
        try:
            module = Settings(source, path, config).module
        except ValueError as error:
            problems.append(str(error))
            continue
        return in_our_names(first, module), in_our_names(second, module)
    raise CheckpointError("; ".join(problems))


def is_different(tensor: Difference) -> bool:
    return tensor.elements != 0 or (tensor.a is not None and tensor.b is not None and tensor.a != tensor.b)


def compare_kind(first: Source, second: Source, kind: Kind) -> Iterator[Difference]:
    a, b = first.forms[kind], second.forms[kind]
    for name in [*a, *(name for name in b if name not in a)]:
        difference = Difference(kind, name, a.get(name), b.get(name))
        if name in a and name in b and a[name].shape == b[name].shape:
            difference = compare(first, second, kind, name)
        yield difference


def compare(first: Source, second: Source, kind: Kind, name: str) -> Difference:
    a, b = first.forms[kind][name], second.forms[kind][name]
    elements, absolute, largest = 0, 0.0, 0.0
    for box in chunks_of(whole(a.shape), CHUNK_ELEMENTS):
        left, right = first.read(kind, name, box), second.read(kind, name, box)
        elements += differing(left, right)
        largest = max_or_nan(largest, left.float().abs())
        absolute = max_or_nan(absolute, (left.float() - right.float()).abs_())
    return Difference(kind, name, a, b, elements, absolute, absolute / largest if largest else absolute)


def differing(a: Tensor, b: Tensor) -> int:
    return differing_bits(a, b) if a.dtype == b.dtype else int((a.float() != b.float()).count_nonzero())


def max_or_nan(so_far: float, values: Tensor) -> float:
    return so_far if not values.numel() else float(torch.maximum(torch.tensor(so_far), values.max()))
