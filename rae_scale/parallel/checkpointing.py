"""Activation checkpointing: keep each block's input, and of the rest as much as a budget says; compute the rest again.

A mode of torch's dispatcher sees the calls of a block one by one, below autograd and autocast and inside our own
autograd functions. Selective mode keeps the outputs of the first calls of each class of `OP_CLASSES`, and hands them
out in place of a second call when backward runs the block again.

Not torch's `create_selective_checkpoint_contexts`: it wants both runs to be equal operator by operator, which autocast
breaks (it casts a weight once for all calls of a block), and it keeps memory that is written to later, which gives
wrong gradients under DeepSpeed's stage 3 (its linear layer adds the bias into the product).
"""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

BLOCK_LISTS = ("blocks", "layers")
"""Attribute names of the lists of transformer blocks: DiT, its wide head, decoder; Qwen2 in transformers."""

OpClass = Literal["linear", "attention", "communication"]

OP_CLASSES: dict[OpClass, tuple[str, ...]] = {
    "linear": (
        "aten::linear",
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_addmm_activation",
        "aten::_scaled_mm",
    ),
    "attention": (
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "torch_attn::_varlen_attn",
    ),
    "communication": (
        "_c10d_functional::all_gather_into_tensor",
        "_c10d_functional::all_reduce",
        "_c10d_functional::all_to_all_single",
        "_c10d_functional::broadcast",
        "_c10d_functional::reduce_scatter_tensor",
    ),
}
"""The operators that a budget counts, by their names in the dispatcher.

Attention without a fused kernel (torch's "math" backend) arrives as two batched products, which count as linear.
`wait_tensor` is not listed: it returns its argument, and for a result that was kept there is nothing to wait for.
The calls of torch.distributed itself, by which engines gather weights, are in no class and always run again.
"""
_CLASS_OF = {name: kind for kind, names in OP_CLASSES.items() for name in names}


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Every transformer block in `module`: the unit of activation checkpointing and of FSDP2's communication.

    Raises:
        ValueError: there is none, so nothing would be checkpointed or sharded block by block.
    """
    blocks = [
        block
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and name.rpartition(".")[2] in BLOCK_LISTS
        for block in child
    ]
    if not blocks:
        raise ValueError(
            f"{type(module).__name__} has no list of blocks; name its nn.ModuleList one of {', '.join(BLOCK_LISTS)}"
        )
    return blocks


def apply_activation_checkpointing(module: nn.Module, mode: str, saved_ops: Mapping[OpClass, int]) -> None:
    """Checkpoint every block of `module`, in place. Gradients are bitwise what they were without.

    mode: none, full (keep a block's input only), or selective (keep also what `saved_ops` says).
    saved_ops: class of `OP_CLASSES` -> the outputs of how many calls to keep in each block, from its first on; -1
        keeps all, and a class that is not named keeps none.
    """
    if mode == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        settings["context_fn"] = functools.partial(selective_contexts, dict(saved_ops))
    for block in blocks_of(module):
        # On `forward` and not in a wrapper module: parameter names, and so checkpoints, stay what they are. No model
        # here draws random numbers (noise and dropout are functions of the sample index), so there is no generator
        # state to restore for the second forward.
        block.forward = functools.partial(checkpoint, block.forward, **settings)


def selective_contexts(saved_ops: Mapping[OpClass, int]) -> tuple[SaveOutputs, ReuseOutputs]:
    """What one call of a block runs under, and its second run in backward."""
    saved: SavedCalls = defaultdict(list)
    return SaveOutputs(saved_ops, saved), ReuseOutputs(saved)


class SavedTensor:
    """A kept output. It shares memory with the one that the forward pass goes on with, until that one is written to."""

    def __init__(self, output: Tensor) -> None:
        # Without its history, which holds the checkpoint, which holds this: a cycle that only the collector would end.
        # The guard makes it share the output's version counter, by which `take` notices that it was written to later.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self._tensor = output.detach()
        self._version = self._tensor._version

    def keep_from(self, written: Tensor) -> None:
        """Called before `written` is written to: part from it if it is the same memory."""
        if self._tensor.untyped_storage()._cdata == written.untyped_storage()._cdata:
            self._tensor = self._tensor.clone()
            self._version = self._tensor._version

    def take(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                "an output that selective activation checkpointing keeps was written to after its block had ended; "
                "write to a copy, or use engine.activation_checkpointing=full"
            )
        return self._tensor


class SavedCall(NamedTuple):
    """A call whose output is kept, with a SavedTensor in place of each tensor; None once it was handed out."""

    op: Any
    output: Any


SavedCalls = defaultdict[OpClass, list[SavedCall]]
"""Class of operators -> its first calls in one run of one block."""


class SaveOutputs(TorchDispatchMode):
    """Runs every call, and keeps the outputs of the first ones of each class."""

    def __init__(self, saved_ops: Mapping[OpClass, int], saved: SavedCalls) -> None:
        super().__init__()
        self._budget = {kind: sys.maxsize if count == -1 else count for kind, count in saved_ops.items()}
        self._saved = saved
        self._tensors: list[SavedTensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for written in written_tensors(func, args, kwargs):
            for saved in self._tensors:
                saved.keep_from(written)
        output = func(*args, **kwargs)
        kind = class_of(func)
        if kind is not None and len(self._saved[kind]) < self._budget.get(kind, 0):
            call = SavedCall(func, tree_map_only(Tensor, SavedTensor, output))
            self._saved[kind].append(call)
            self._tensors += (leaf for leaf in tree_leaves(call.output) if isinstance(leaf, SavedTensor))
        return output


class ReuseOutputs(TorchDispatchMode):
    """Hands out what was kept, in the order of the calls, and runs everything else."""

    def __init__(self, saved: SavedCalls) -> None:
        super().__init__()
        self._saved = saved
        self._calls: defaultdict[OpClass, int] = defaultdict(int)

    def __enter__(self) -> Any:
        self._calls.clear()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = class_of(func)
        if kind is None:
            return func(*args, **(kwargs or {}))
        index = self._calls[kind]
        self._calls[kind] += 1
        if index >= len(self._saved[kind]):
            return func(*args, **(kwargs or {}))
        call = self._saved[kind][index]
        if call.op is not func:
            raise RuntimeError(
                f"backward ran {func} where the forward pass of this block had run {call.op}; a block must compute the "
                "same both times, so a choice between attention kernels has to be made inside of it"
            )
        if call.output is None:
            raise RuntimeError(
                "backward went through this block before, and what selective activation checkpointing had kept of it "
                "is gone; use engine.activation_checkpointing=full"
            )
        self._saved[kind][index] = call._replace(output=None)
        return tree_map_only(SavedTensor, SavedTensor.take, call.output)


@functools.cache
def class_of(func: Any) -> OpClass | None:
    """The class that counts `func`. None also if it writes to an argument: only running it again fills that one."""
    schema = getattr(func, "_schema", None)
    return None if schema is None or schema.is_mutable else _CLASS_OF.get(schema.name)


@functools.cache
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that `func` writes to."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return ()
    arguments = tuple(enumerate(schema.arguments))
    if schema.name.startswith("c10d::"):
        # The calls of torch.distributed write to tensors without declaring it.
        return tuple((position, argument.name) for position, argument in arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def written_tensors(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for position, name in written_arguments(func):
        value = args[position] if position < len(args) else kwargs.get(name)
        yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
