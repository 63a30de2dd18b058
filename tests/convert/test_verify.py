"""Comparing what was written with what it was made from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rae_scale.convert import verify as verify_module
from rae_scale.convert.verify import differing_bits, verify
from rae_scale.state import CheckpointError
from tests.convert.made import MemorySource

TENSORS = {"a": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), "b": torch.tensor([1.0, float("nan")])}


def source(**changes: Tensor) -> MemorySource:
    return MemorySource("native", {**TENSORS, **changes})


def cast(dtype: torch.dtype, **changes: Tensor) -> MemorySource:
    return MemorySource("native", {name: tensor.to(dtype) for name, tensor in {**TENSORS, **changes}.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "CHUNK_ELEMENTS", 4)
    assert verify(source(), cast(dtype), dtype) == 37


def test_each_difference_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "CHUNK_ELEMENTS", 7)
    changed = TENSORS["a"].clone()
    changed[3, 5] += 1e-6
    with pytest.raises(CheckpointError, match=r"1 of 7 elements of weight of a, \[3:4, 0:7\], are not what"):
        verify(source(), cast(torch.float32, a=changed), torch.float32)


def test_other_tensors_and_forms() -> None:
    with pytest.raises(CheckpointError, match=r"weight of c should not be in it"):
        verify(source(), source(c=torch.ones(1)), torch.float32)
    with pytest.raises(CheckpointError, match=r"weight of c is not in it"):
        verify(source(c=torch.ones(1)), source(), torch.float32)
    with pytest.raises(CheckpointError, match=r"weight of b has shape \[3\]"):
        verify(source(), source(b=torch.ones(3)), torch.float32)
    with pytest.raises(CheckpointError, match=r"35 of 35 elements of weight of a"):
        verify(source(), cast(torch.bfloat16), torch.float32)


def test_bits_are_compared_and_not_values() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert differing_bits(nan, nan.clone()) == 0
    assert differing_bits(zero, -zero) == 1
