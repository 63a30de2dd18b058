"""Whether a plan uses what an earlier one found out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import nn


@contextmanager
def nothing_new(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models may be neither built nor run in the block: that is what makes a plan take seconds."""

    def refuse(module: nn.Module, *args: object, **kwargs: object) -> None:
        raise AssertionError(f"{type(module).__name__} again")

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__init__", refuse)
        patch.setattr(nn.Module, "__call__", refuse)
        yield
