"""Which tokens of a sequence a model computes: all of them, unless sequence parallelism has put a slice in place."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Tokens(Protocol):
    """A share of the tokens of every sequence, and what has to be moved between the shares.

    B samples, L tokens in all, P of them here, C channels.
    """

    def padded(self, length: int) -> int:
        """To how many tokens a sequence of `length` is filled up, so that the shares are equal."""
        ...

    def first(self, length: int) -> int:
        """The place of the first of the tokens that are computed here, of a sequence of `length` (padded) tokens."""
        ...

    def positions(self, length: int, device: torch.device) -> Tensor:
        """int64 [P]: the places of all of them: first, first + 1, ..., first + P - 1."""
        ...

    def share(self, parts: Tensor) -> Tensor:
        """The sum of all shares' `parts` [B, L, C], each zero where another share knows the value: here's [B, P, C]."""
        ...

    def collect(self, here: Tensor) -> Tensor:
        """All shares' tokens, [B, L, C], from each one's [B, P, C]."""
        ...


class AllTokens:
    """The only share there is."""

    def padded(self, length: int) -> int:
        return length

    def first(self, length: int) -> int:
        return 0

    def positions(self, length: int, device: torch.device) -> Tensor:
        return torch.arange(length, device=device)

    def share(self, parts: Tensor) -> Tensor:
        return parts

    def collect(self, here: Tensor) -> Tensor:
        return here
