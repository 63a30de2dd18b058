"""Casting weights to another dtype, and what that did to them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rae_scale.state.format import CheckpointError

BLOCK = 1 << 18  # elements compared at a time: the comparison is in float32, and its memory shall not matter


@dataclass
class Largest:
    """The largest error so far and the tensor it is in; "" while there is none."""

    error: float = 0.0
    tensor: str = ""

    def offer(self, error: float, tensor: str) -> None:
        if error > self.error:
            self.error, self.tensor = error, tensor


@dataclass
class CastErrors:
    """What casting changed, over all tensors that passed through `cast` in parts.

    absolute: the largest difference of an element. relative: the largest of any tensor's largest difference over its
    largest entry. JSON-able state, so that an interrupted conversion can report the whole.
    """

    absolute: Largest = field(default_factory=Largest)
    relative: Largest = field(default_factory=Largest)
    tensor: str = ""
    """The one that the parts at hand are of, and its largest error and entry so far."""
    error: float = 0.0
    entry: float = 0.0

    def cast(self, part: Tensor, dtype: torch.dtype, tensor: str) -> Tensor:
        """`part` of the tensor named `tensor` in `dtype`. Parts of one tensor come one after the other.

        Raises:
            CheckpointError: a number is too large for `dtype`.
        """
        out = part.to(dtype)
        if tensor != self.tensor:
            self.settle()
            self.tensor = tensor
        if part.dtype != dtype:
            for before, after in zip(part.reshape(-1).split(BLOCK), out.reshape(-1).split(BLOCK), strict=True):
                self.compare(before.float(), after.float(), dtype)
        return out

    def settle(self) -> None:
        """The tensor at hand has no further parts."""
        self.absolute.offer(self.error, self.tensor)
        self.relative.offer(self.error / self.entry if self.entry else 0.0, self.tensor)
        self.tensor, self.error, self.entry = "", 0.0, 0.0

    def compare(self, before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
        if not before.numel():
            return
        error = float((after - before).abs_().max())
        if math.isfinite(error):
            self.entry = max(self.entry, float(before.abs().max()))
            self.error = max(self.error, error)
            return
        # Infinities and NaN stay what they are; what the cast made infinite is an error.
        finite = before.isfinite()
        before = before.where(finite, 0.0)
        after = after.where(finite, 0.0)
        if not after.isfinite().all():
            raise CheckpointError(
                f"{self.tensor} has an entry of {before.abs().max():.4g}, and {dtype} ends at "
                f"{torch.finfo(dtype).max:.4g}; use --dtype bfloat16 or float32"
            )
        self.entry = max(self.entry, float(before.abs().max()))
        self.error = max(self.error, float((after - before).abs_().max()))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> CastErrors:
        return cls(**{**state, "absolute": Largest(**state["absolute"]), "relative": Largest(**state["relative"])})
