"""What the tests of activation checkpointing share."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rae_scale.parallel import blocks_of
from rae_scale.parallel.checkpointing import class_of

EVERYTHING = {"linear": -1, "attention": -1, "communication": -1}


def storages(values: Any) -> dict[int, torch.UntypedStorage]:
    found = (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in found}


class Watch(TorchDispatchMode):
    """Counts the calls that really run while blocks run, by class, and knows what memory they made is still held."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.counts: Counter[str | None] = Counter()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._depth = 0
        for block in blocks_of(module):
            block.forward = self._watched(block.forward)

    def _watched(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*args: Any, **kwargs: Any) -> Tensor:
            self._depth += 1
            try:
                return forward(*args, **kwargs)
            finally:
                self._depth -= 1

        return watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._depth:
            self.counts[class_of(func)] += 1
            given = storages((args, kwargs)).keys()
            for key, storage in storages(output).items():
                if key not in given:
                    self._made[key] = StorageWeakRef(storage), storage.nbytes()
        return output

    def held_bytes(self) -> int:
        gc.collect()
        return sum(size for ref, size in self._made.values() if not ref.expired())


def gradients(module: nn.Module, *args: Any) -> list[Tensor]:
    module(*args).float().square().sum().backward()
    leaves = [*module.parameters(), *(arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad)]
    taken = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return taken


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert any(bool(a.any()) for a in ours)
