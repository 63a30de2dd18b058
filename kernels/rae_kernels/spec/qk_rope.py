"""Queries and keys of a packed projection, normalised per head and rotated, in plain PyTorch.

First the functions as one would write them, which autograd differentiates; then the operators' specifications, whose
arithmetic is float32 (float64 for float64 tensors) and which round once, to the type of each result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rae_kernels.dispatch import wide
from rae_kernels.spec.norm import norm_backward, norm_forward, rms_norm


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) by its token's angle.

    x: [B, T, H, D] queries or keys; cos, sin: [T, D], each angle held twice, for both members of its pair.
    The axes (1-D, 2-D) are the business of whoever makes the tables. Float32 arithmetic, result in x.dtype.
    """
    return rotated(x, cos, sin).to(x.dtype)


def qk_norm_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = split_heads(qkv, head_dim)
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v.contiguous()


def qk_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each [B, T, H, D] and a tensor of its own."""
    q, k, v = split_heads(qkv, head_dim)
    values_q, values_k = wide(q), wide(k)
    if q_weight is not None and k_weight is not None:
        values_q = norm_forward(q, q_weight, None, None, None, head_dim, eps, values_q.dtype)[0]
        values_k = norm_forward(k, k_weight, None, None, None, head_dim, eps, values_k.dtype)[0]
    q, k = (rotated(values, cos, sin).to(qkv.dtype).contiguous() for values in (values_q, values_k))
    # A copy even where v is contiguous, which it is if there is one token: results must not be views.
    return q, k, v.clone(memory_format=torch.contiguous_format)


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
    """Gradients of qkv, q_weight and k_weight, those of absent weights empty. qkv is needed only where there is a norm.

    A rotation's gradient is the rotation back.
    """
    head_dim = for_q.shape[-1]
    inner_q, inner_k = rotated(wide(for_q), cos, -sin), rotated(wide(for_k), cos, -sin)
    for_q_weight, for_k_weight = inner_q.new_empty(0), inner_q.new_empty(0)
    if qkv is not None and q_weight is not None and k_weight is not None:
        q, k, _ = split_heads(qkv, head_dim)
        inner_q, for_q_weight = through_norm(inner_q, q, q_weight, eps)
        inner_k, for_k_weight = through_norm(inner_k, k, k_weight, eps)
    parts = [part.flatten(-2).to(for_q.dtype) for part in (inner_q, inner_k, for_v)]
    return torch.cat(parts, dim=-1), for_q_weight, for_k_weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation in the type that x and the tables make together."""
    cos, sin = cos[:, None, :], sin[:, None, :]  # [T, 1, D]: the same for every head
    quarter_turn = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return x * cos + quarter_turn * sin


def through_norm(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the input and the weight of the norm of each head: the first wide, the second as the weight is."""
    head_dim = x.shape[-1]
    factor = torch.rsqrt(wide(x).square().mean(dim=-1, keepdim=True) + eps)
    for_x, for_weight, *_ = norm_backward(gradient, x, weight, None, factor, False, head_dim)
    return for_x, for_weight.to(weight.dtype)


def split_heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, ...]:
    """Views [B, T, H, D] of the queries, keys and values in qkv [B, T, 3 * H * D]."""
    return tuple(part.unflatten(-1, (-1, head_dim)) for part in qkv.chunk(3, dim=-1))
