"""Tensors [..., C] as the rows that a kernel walks over."""

from __future__ import annotations

from torch import Tensor


def rows_of(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor [..., C] as rows for a kernel to read, and the distance between them. A copy if it must be."""
    if tensor is None:
        return None, 0
    rows = (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).flatten(0, -2)
    return rows, rows.stride(0)


def written_rows(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """The same for a tensor that a kernel writes to, which must not be a copy."""
    rows, stride = rows_of(tensor)
    assert rows is None or tensor is None or rows.data_ptr() == tensor.data_ptr(), "this memory cannot be seen as rows"
    return rows, stride
