"""The gated activation of the feed-forward layer, silu(gate) * value, with what its neighbours need kept once.

Backward needs gate and value, and the layer after the activation needs the activation for its weight's gradient: three
tensors of one width. `swiglu_into` keeps the first two and forms the third again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rae_kernels.dispatch import operation, plain
from rae_kernels.spec import swiglu as spec

TRITON = "rae_kernels.triton_impl.swiglu"


def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) * value, for `packed` [..., 2F] that holds gate then value. Returns [..., F] in the same dtype.

    Float32 arithmetic, rounded once. Raises ValueError if the last dimension is odd.
    """
    if packed.shape[-1] % 2:
        raise ValueError(f"packed is {list(packed.shape)}: its last dimension must be even, for a gate and a value")
    return spec.swiglu(*packed.chunk(2, dim=-1)) if plain(packed) else swiglu_packed(packed)


def swiglu_pair(gate: Tensor, value: Tensor) -> Tensor:
    """`swiglu` of a gate and a value [..., F] that two layers made. Raises ValueError if shapes or types differ."""
    if gate.shape != value.shape or gate.dtype != value.dtype:
        raise ValueError(
            f"gate is {gate.dtype} {list(gate.shape)}, but value is {value.dtype} {list(value.shape)}: they must agree"
        )
    return spec.swiglu(gate, value) if plain(gate) else swiglu_separate(gate, value)


def swiglu_into(packed: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """`layer(swiglu(packed))`, where backward forms the activation again instead of keeping it. Same bits either way.

    layer: whatever maps [..., F] to the result; it may flatten its input. A copy that it makes of it, such as autocast
    to another type, is kept as ever. So is the activation where plain PyTorch runs (RAE_KERNELS=reference), in
    torch.compile, which decides by itself what to form again, and inside activation checkpointing or other
    saved-tensor hooks, which would not see what is kept here.
    """
    activation = swiglu(packed)
    if (
        plain(packed)
        or torch.compiler.is_compiling()
        or not (packed.requires_grad and torch.is_grad_enabled())
        or has_saved_tensor_hooks()
    ):
        return layer(activation)
    kept, storage = packed.detach(), activation.untyped_storage()._cdata
    numel, dtype = activation.numel(), activation.dtype

    # Neither function may refer to the activation: they live as long as the graph. It exists until `layer` returns, so
    # nothing else has its storage's address meanwhile.
    def pack(tensor: Tensor) -> Tensor | Recomputed:
        is_activation = (
            tensor.numel() == numel
            and tensor.dtype == dtype
            and tensor.is_contiguous()
            and tensor.untyped_storage()._cdata == storage
        )
        if is_activation:
            return Recomputed(kept, tensor.shape)
        # A result that its own node keeps would hold that node, and be held by it, for ever. A parameter is kept as
        # it is: ZeRO-3 takes its values away in between.
        return tensor if tensor.is_leaf else tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return layer(activation)


class Recomputed(NamedTuple):
    """Stands for the activation of `packed`, seen in another shape, among the tensors kept for backward."""

    packed: Tensor
    shape: torch.Size


def unpack(kept: Tensor | Recomputed) -> Tensor:
    return swiglu_packed(kept.packed).view(kept.shape) if isinstance(kept, Recomputed) else kept


def has_saved_tensor_hooks() -> bool:
    """Whether others decide here what is kept for backward: only the innermost hooks are asked."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


@operation(f"{TRITON}:swiglu_packed")
def swiglu_packed(packed: Tensor) -> Tensor:
    return spec.swiglu_forward(*packed.chunk(2, dim=-1))


@operation(f"{TRITON}:swiglu_packed_backward")
def swiglu_packed_backward(gradient: Tensor, packed: Tensor) -> Tensor:
    return torch.cat(spec.swiglu_backward(gradient, *packed.chunk(2, dim=-1)), dim=-1)


@operation(f"{TRITON}:swiglu_separate")
def swiglu_separate(gate: Tensor, value: Tensor) -> Tensor:
    return spec.swiglu_forward(gate, value)


@operation(f"{TRITON}:swiglu_separate_backward")
def swiglu_separate_backward(gradient: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return spec.swiglu_backward(gradient, gate, value)


@swiglu_packed.register_fake
def _(packed: Tensor) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


@swiglu_packed_backward.register_fake
def _(gradient: Tensor, packed: Tensor) -> Tensor:
    return packed.new_empty(packed.shape)


@swiglu_separate.register_fake
def _(gate: Tensor, value: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@swiglu_separate_backward.register_fake
def _(gradient: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), value.new_empty(value.shape)


def keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def differentiate_packed(ctx: Any, gradient: Tensor) -> Tensor:
    return swiglu_packed_backward(gradient, *ctx.saved_tensors)


def differentiate_separate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_separate_backward(gradient, *ctx.saved_tensors)


swiglu_packed.register_autograd(differentiate_packed, setup_context=keep)
swiglu_separate.register_autograd(differentiate_separate, setup_context=keep)
