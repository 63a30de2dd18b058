"""How much memory a forward pass leaves behind for backward, on any device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(NamedTuple):
    """Bytes that a forward pass made and that still live, its result included.

    weight_copies: of these, casts of parameters, which autocast makes once however large the batch is.
    """

    total: int
    weight_copies: int

    @property
    def activations(self) -> int:
        return self.total - self.weight_copies


class Census(TorchDispatchMode):
    """Keeps a list of every memory that operators allocate below autograd, without keeping it alive.

    What an operator allocates inside and keeps to itself is not seen, nor is the inside of a compiled function.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.parameters = {identity(parameter) for parameter in parameters}
        self.made: dict[int, tuple[StorageWeakRef, int, bool]] = {}
        self.foreign: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            if identity(tensor) not in self.made:
                self.foreign[identity(tensor)] = StorageWeakRef(tensor.untyped_storage())
        casts_weight = func is torch.ops.aten._to_copy.default and identity(given[0]) in self.parameters
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and identity(tensor) not in self.foreign:
                storage = tensor.untyped_storage()
                self.made.setdefault(identity(tensor), (StorageWeakRef(storage), storage.nbytes(), casts_weight))
        return out

    def alive(self) -> Alive:
        living = [(count, copy) for reference, count, copy in self.made.values() if not reference.expired()]
        return Alive(sum(count for count, _ in living), sum(count for count, copy in living if copy))


def identity(tensor: Tensor) -> int:
    """Of a tensor's memory. Weak references keep the number from being given to another one."""
    return tensor.untyped_storage()._cdata


def alive_after(forward: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> Alive:
    """What `forward` leaves behind while its result is held: activations kept for backward, and the result.

    parameters: whose casts are told apart. Exact on every device, but sees nothing inside compiled functions.
    """
    gc.collect()
    with Census(parameters) as census:
        result = forward()
        found = census.alive()
    del result
    return found


def allocated_after(forward: Callable[[], Tensor], device: torch.device) -> int | None:
    """The same as the allocator of a GPU counts it, compiled functions included; None on other devices.

    To be called after a first forward and backward pass: libraries take their workspaces at the first call.
    """
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    result = forward()
    torch.cuda.synchronize(device)
    found = torch.cuda.memory_allocated(device) - before
    del result
    return found
