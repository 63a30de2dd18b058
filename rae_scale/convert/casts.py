"""Casting weights to another dtype, and what that did to them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rae_scale.state.format import CheckpointError

BLOCK = 1 << 16  # elements cast and compared at a time, so few that a core's own cache holds them


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
        if tensor != self.tensor:
            self.settle()
            self.tensor = tensor
        if part.dtype == dtype:
            return part
        out = torch.empty(part.shape, dtype=dtype)
        for before, after in zip(part.reshape(-1).split(BLOCK), out.view(-1).split(BLOCK), strict=True):
            after.copy_(before)
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
        error = largest(after - before)
        if math.isfinite(error):
            self.entry = max(self.entry, largest(before))
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
        self.entry = max(self.entry, largest(before))
        self.error = max(self.error, largest(after - before))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> CastErrors:
        return cls(**{**state, "absolute": Largest(**state["absolute"]), "relative": Largest(**state["relative"])})


def largest(x: Tensor) -> float:
    """max |x|; NaN if there is one. In one pass, where `x.abs().max()` takes two and the memory between them."""
    low, high = x.aminmax()
    return max(-float(low), float(high)) if low == low else math.nan
