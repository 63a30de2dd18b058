"""From the packed projection of attention to its queries, keys and values: norm per head, rotation, in one pass.

Backward writes the gradients of all three into the one of the packed projection. Without a norm nothing of the
projection is kept for it: a rotation is undone by the rotation back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rae_kernels.dispatch import operation, plain, wide
from rae_kernels.spec import qk_rope as spec

TRITON = "rae_kernels.triton_impl.qk_rope"


def qk_norm_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split `qkv` [B, T, 3 * H * D] into q, k, v [B, T, H, D], with q and k turned by the angles of their tokens.

    qkv:       all query heads, then all key heads, then all value heads, D = `head_dim` channels each.
    cos, sin:  float32 [T, D], each angle held twice, for both members of the pair (2i, 2i + 1) that it turns. They get
               no gradient.
    q_weight, k_weight: [D]; with them each head of q and k is scaled to unit root mean square, times the weight, first.

    Float32 arithmetic, rounded once to the type of qkv. The results are contiguous and share no memory with qkv.

    Raises:
        ValueError: the shapes do not fit each other, head_dim is odd, or there is one weight without the other.
    """
    check(qkv, cos, sin, head_dim, q_weight, k_weight)
    if plain(qkv):
        return spec.qk_norm_rope(qkv, cos, sin, head_dim, q_weight, k_weight, eps)
    return qk_rope(qkv, cos, sin, q_weight, k_weight, head_dim, eps)


def check(
    qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int, q_weight: Tensor | None, k_weight: Tensor | None
) -> None:
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim} has no pairs to rotate: it must be a positive multiple of 2")
    if qkv.dim() != 3 or qkv.shape[-1] % (3 * head_dim):
        raise ValueError(
            f"qkv is {list(qkv.shape)}, but it must be [B, T, 3 * H * {head_dim}]: queries, keys and values of whole "
            f"heads of head_dim={head_dim}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) != (qkv.shape[1], head_dim):
            raise ValueError(
                f"{name} is {list(table.shape)}, but qkv {list(qkv.shape)} with head_dim={head_dim} needs "
                f"[{qkv.shape[1]}, {head_dim}]: one row per token, each angle held twice"
            )
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight come together: give both, or neither for no norm")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and tuple(weight.shape) != (head_dim,):
            raise ValueError(f"{name} is {list(weight.shape)}, but it is shared by all heads: it must be [{head_dim}]")


@operation(f"{TRITON}:qk_rope")
def qk_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return spec.qk_rope(qkv, cos, sin, q_weight, k_weight, head_dim, eps)


@operation(f"{TRITON}:qk_rope_backward")
def qk_rope_backward(
    for_q: Tensor,
    for_k: Tensor,
    for_v: Tensor,
    qkv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, q_weight and k_weight; those of weights that are not there are empty."""
    return spec.qk_rope_backward(for_q, for_k, for_v, qkv, cos, sin, q_weight, k_weight, eps)


@qk_rope.register_fake
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Any, k_weight: Any, head_dim: int, eps: float
) -> tuple[Tensor, ...]:
    batch, tokens, width = qkv.shape
    return tuple(qkv.new_empty(batch, tokens, width // (3 * head_dim), head_dim) for _ in range(3))


@qk_rope_backward.register_fake
def _(
    for_q: Tensor,
    for_k: Tensor,
    for_v: Tensor,
    qkv: Any,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    batch, tokens, num_heads, head_dim = for_q.shape
    for_qkv = for_q.new_empty(batch, tokens, 3 * num_heads * head_dim)
    return for_qkv, *(wide(for_q).new_empty(0) if w is None else w.new_empty(w.shape) for w in (q_weight, k_weight))


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, cos, sin, q_weight, k_weight, _, ctx.eps = inputs
    ctx.save_for_backward(None if q_weight is None else qkv, cos, sin, q_weight, k_weight)


def differentiate(ctx: Any, for_q: Tensor, for_k: Tensor, for_v: Tensor) -> tuple[Tensor | None, ...]:
    qkv, cos, sin, q_weight, k_weight = ctx.saved_tensors
    for_qkv, *for_weights = qk_rope_backward(for_q, for_k, for_v, qkv, cos, sin, q_weight, k_weight, ctx.eps)
    for_q_weight, for_k_weight = (None, None) if q_weight is None else for_weights
    return for_qkv, None, None, for_q_weight, for_k_weight, None, None


qk_rope.register_autograd(differentiate, setup_context=keep)
