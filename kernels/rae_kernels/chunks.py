"""Chunks of a packed tensor whose gradients are written side by side, so that backward need not put them together.

An operator's backward pass asks `gradient_like` for the memory of a chunk's gradient. For chunks that come from
`chunks` it is part of one packed gradient, shared by all operators that read a chunk of the same tensor. When autograd
has all of them, it finds them in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Pack:
    """Where the gradient of one packed tensor is being put together. It keeps neither of the two alive for long."""

    def __init__(self, packed: Tensor, count: int) -> None:
        # While there is a weak reference, no other storage can get the number under which this one is known.
        self.storage = StorageWeakRef(packed.untyped_storage())
        self.offset, self.stride = packed.storage_offset(), packed.stride()
        self.shape, self.dtype, self.device = packed.shape, packed.dtype, packed.device
        self.width, self.count = packed.shape[-1] // count, count
        self.gradient: Tensor | None = None
        self.taken: set[int] = set()

    def part_like(self, chunk: Tensor) -> Tensor | None:
        """The part of the gradient that belongs to `chunk`; None if that is no chunk of this tensor, or if another
        consumer of the same chunk has its gradient there: autograd adds the two up."""
        number, rest = divmod(chunk.storage_offset() - self.offset, self.width)
        expected = (*self.shape[:-1], self.width)
        if rest or not 0 <= number < self.count or tuple(chunk.shape) != expected or chunk.stride() != self.stride:
            return None
        if number in self.taken:
            return None
        if self.gradient is None:
            self.gradient = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        part = self.gradient.narrow(-1, number * self.width, self.width)
        self.taken.add(number)
        if len(self.taken) == self.count:
            self.gradient = None  # its parts hold the memory now
        return part


WITHOUT_VALUES = ("FakeTensor", "Hollow")
"""Classes of tensors that pretend to have values: torch's, and the one that rae-scale plans with."""

_packs: dict[int, Pack] = {}
"""By the storage of the packed tensor."""


class Chunks(torch.autograd.Function):
    """torch.chunk along the last dimension, of a contiguous tensor."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, count: int) -> tuple[Tensor, ...]:
        return packed.chunk(count, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return (whole(gradients) if in_place(gradients) else torch.cat(gradients, dim=-1)), None


def in_place(gradients: tuple[Tensor, ...]) -> bool:
    """Whether these are the chunks of one contiguous tensor, in order."""
    first, width = gradients[0], gradients[0].shape[-1]
    stride = packed_stride(first.shape, len(gradients))
    return all(
        gradient.untyped_storage()._cdata == first.untyped_storage()._cdata
        and gradient.storage_offset() == first.storage_offset() + number * width
        and gradient.stride() == stride
        for number, gradient in enumerate(gradients)
    )


def whole(gradients: tuple[Tensor, ...]) -> Tensor:
    first, count = gradients[0], len(gradients)
    shape = (*first.shape[:-1], count * first.shape[-1])
    return first.as_strided(shape, packed_stride(first.shape, count), first.storage_offset())


def packed_stride(chunk: torch.Size, count: int) -> tuple[int, ...]:
    """Of a contiguous tensor whose last dimension is `count` times that of `chunk`."""
    strides, size = [1], chunk[-1] * count
    for length in reversed(chunk[:-1]):
        strides.append(size)
        size *= length
    return tuple(reversed(strides))


def chunks(packed: Tensor, count: int) -> tuple[Tensor, ...]:
    """`packed` [..., count * C], as `count` views [..., C].

    The operators of this library write the gradients of such views next to each other in one tensor, which becomes the
    gradient of `packed` as it stands. Gradients that come from elsewhere are put together by a copy.
    """
    if packed.shape[-1] % count:
        raise ValueError(f"packed is {list(packed.shape)}: its last dimension does not divide into {count} chunks")
    if torch.compiler.is_compiling() or not packed.is_contiguous() or storage_of(packed) is None:
        return packed.chunk(count, dim=-1)
    if not (packed.requires_grad and torch.is_grad_enabled()):
        return packed.chunk(count, dim=-1)
    for key in [key for key, pack in _packs.items() if pack.storage.expired()]:
        del _packs[key]
    _packs[packed.untyped_storage()._cdata] = Pack(packed, count)
    return Chunks.apply(packed, count)


def storage_of(tensor: Tensor) -> int | None:
    """The number of the memory that `tensor` is a view of; None while a compiler traces with tensors that have none.
    Those that only pretend to have values have a number, too: a plan of memory must see the same as a run."""
    has_storage = type(tensor) is Tensor or type(tensor).__name__ in WITHOUT_VALUES
    return tensor.untyped_storage()._cdata if has_storage and not torch.compiler.is_compiling() else None


def gradient_like(chunk: Tensor) -> Tensor:
    """Memory for the gradient of `chunk`: its place beside the others if it is one of `chunks`, else its own."""
    where = storage_of(chunk)
    pack = None if where is None else _packs.get(where)
    part = None if pack is None else pack.part_like(chunk)
    return torch.empty(chunk.shape, dtype=chunk.dtype, device=chunk.device) if part is None else part
