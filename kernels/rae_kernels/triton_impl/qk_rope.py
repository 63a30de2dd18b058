"""Kernels of `rae_kernels.qk_rope`: a program has a tile of the heads of one token, of q, k and v at once.

A row of the tile is a head, padded to a power of two with lanes that load nothing. In memory the heads of a token
follow each other without a gap, so the rows of a tile are one run of it. A thread has 8 elements at a time, 16 bytes of
bfloat16, all of one head as head_dim is a multiple of 8, and with them both members of each pair.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rae_kernels.triton_impl.rows import rows_of
from rae_kernels.triton_impl.variants import ELEMENT, Variant

PROGRAMS = 2048
"""Of a backward pass with a norm, whatever the device: the sum over tokens must not depend on it."""


@triton.jit
def split_pairs(x):
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def rotate(x, cos, sin):
    even, odd = split_pairs(x)
    turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return tl.reshape(turned, (x.shape[0], x.shape[1]))


@triton.jit
def row_of(pointer, row, stride):
    return pointer + row.to(tl.int64) * stride


@triton.jit
def load_angles(table, token, d, D: tl.constexpr):
    """Cosines or sines, [1, BLOCK / 2]: one for each pair, whose members have the same."""
    return split_pairs(tl.load(table + token * D + d[None, :], mask=(d < D)[None, :], other=0.0))[0]


@triton.jit
def load_weight(weight, d, D: tl.constexpr):
    return tl.load(weight + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def inverse_rms(x, D: tl.constexpr, eps):
    return tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)


@triton.jit
def tile_of_heads(item, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Token of a tile, its heads, where its elements are among the heads of a token, and which there are."""
    tiles: tl.constexpr = (H + HEADS - 1) // HEADS
    token = item // tiles
    head = item % tiles * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK)
    return token, head, head[:, None] * D + d[None, :], (head < H)[:, None] & (d < D)[None, :]


@triton.jit
def qk_rope_kernel(
    qkv, cos, sin, q_weight, k_weight, q, k, v, T, qkv_stride, eps,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    token, _, place, inside = tile_of_heads(tl.program_id(0), H, D, HEADS, BLOCK)
    d = tl.arange(0, BLOCK)
    source = row_of(qkv, token, qkv_stride) + place
    queries = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    keys = tl.load(source + H * D, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(source + 2 * H * D, mask=inside, other=0.0)
    cosines, sines = load_angles(cos, token % T, d, D), load_angles(sin, token % T, d, D)
    if NORM:
        queries *= inverse_rms(queries, D, eps) * load_weight(q_weight, d, D)
        keys *= inverse_rms(keys, D, eps) * load_weight(k_weight, d, D)
    tl.store(row_of(q, token, H * D) + place, rotate(queries, cosines, sines), mask=inside)
    tl.store(row_of(k, token, H * D) + place, rotate(keys, cosines, sines), mask=inside)
    tl.store(row_of(v, token, H * D) + place, values, mask=inside)


@triton.jit
def through_norm(gradient, x, weight, D: tl.constexpr, eps):
    """Gradient of a norm's input, and what the tile adds to that of its weight."""
    r = inverse_rms(x, D, eps)
    normal = x * r
    inner = gradient * weight
    along = tl.sum(inner * normal, axis=1, keep_dims=True) / D
    return r * (inner - normal * along), gradient * normal


@triton.jit
def load_gradient(gradient, batch, position, head, d, inside, batch_stride, token_stride, head_stride):
    of_token = row_of(row_of(gradient, batch, batch_stride), position, token_stride)
    return tl.load(row_of(of_token, head[:, None], head_stride) + d[None, :], mask=inside, other=0.0)


@triton.jit
def qk_rope_backward_kernel(
    for_q, for_k, for_v, qkv, cos, sin, q_weight, k_weight, for_qkv, for_weights, items, T, qkv_stride, eps,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK)
    if NORM:
        scale_q, scale_k = load_weight(q_weight, d, D), load_weight(k_weight, d, D)
        sum_q, sum_k = tl.zeros([HEADS, BLOCK], tl.float32), tl.zeros([HEADS, BLOCK], tl.float32)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        token, head, place, inside = tile_of_heads(item, H, D, HEADS, BLOCK)
        batch = token // T
        position = token % T
        dq = load_gradient(for_q, batch, position, head, d, inside, q_batch, q_token, q_head).to(tl.float32)
        dk = load_gradient(for_k, batch, position, head, d, inside, k_batch, k_token, k_head).to(tl.float32)
        dv = load_gradient(for_v, batch, position, head, d, inside, v_batch, v_token, v_head)
        cosines, sines = load_angles(cos, position, d, D), load_angles(sin, position, d, D)
        dq, dk = rotate(dq, cosines, -sines), rotate(dk, cosines, -sines)
        if NORM:
            source = row_of(qkv, token, qkv_stride) + place
            queries = tl.load(source, mask=inside, other=0.0).to(tl.float32)
            keys = tl.load(source + H * D, mask=inside, other=0.0).to(tl.float32)
            dq, of_q = through_norm(dq, queries, scale_q, D, eps)
            dk, of_k = through_norm(dk, keys, scale_k, D, eps)
            sum_q += of_q
            sum_k += of_k
        target = row_of(for_qkv, token, 3 * H * D) + place
        tl.store(target, dq, mask=inside)
        tl.store(target + H * D, dk, mask=inside)
        tl.store(target + 2 * H * D, dv, mask=inside)
    if NORM:
        of_program = for_weights + tl.program_id(0) * D + d
        tl.store(of_program, tl.sum(sum_q, axis=0), mask=d < D)
        tl.store(of_program + tl.num_programs(0) * D, tl.sum(sum_k, axis=0), mask=d < D)


def shape_of(num_heads: int, head_dim: int) -> dict[str, int]:
    """Tile and warps: two 16-byte loads of bfloat16 per thread and tensor, and no more rows than there are heads."""
    block = triton.next_power_of_2(head_dim)
    heads = min(max(1, 2048 // block), triton.next_power_of_2(num_heads))
    return {"H": num_heads, "D": head_dim, "HEADS": heads, "BLOCK": block, "num_warps": max(1, heads * block // 512)}


def qk_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    num_heads = width // (3 * head_dim)
    q, k, v = (qkv.new_empty(batch, tokens, num_heads, head_dim) for _ in range(3))
    rows, stride = rows_of(qkv)
    shape = shape_of(num_heads, head_dim)
    if qkv.numel():
        qk_rope_kernel[(batch * tokens * triton.cdiv(num_heads, shape["HEADS"]),)](
            rows, cos.contiguous(), sin.contiguous(), contiguous(q_weight), contiguous(k_weight), q, k, v,
            tokens, stride, eps, NORM=q_weight is not None, **shape,
        )  # fmt: skip
    return q, k, v


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
    batch, tokens, num_heads, head_dim = for_q.shape
    gradients = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (for_q, for_k, for_v)]
    strides = [stride for tensor in gradients for stride in tensor.stride()[:3]]
    for_qkv = for_q.new_empty(batch, tokens, 3 * num_heads * head_dim)
    shape = shape_of(num_heads, head_dim)
    items = batch * tokens * triton.cdiv(num_heads, shape["HEADS"])
    programs = items if q_weight is None else min(items, PROGRAMS)
    parts = None
    if q_weight is not None:
        parts = torch.empty(2, programs, head_dim, dtype=torch.float32, device=for_q.device)
    rows, stride = rows_of(qkv)
    if items:
        qk_rope_backward_kernel[(programs,)](
            *gradients, rows, cos.contiguous(), sin.contiguous(), contiguous(q_weight), contiguous(k_weight), for_qkv,
            parts, items, tokens, stride, eps, *strides, NORM=q_weight is not None, **shape,
        )  # fmt: skip
    if parts is None or q_weight is None or k_weight is None:
        return for_qkv, *(torch.empty(0, dtype=torch.float32, device=for_q.device) for _ in range(2))
    # Two sums and not one of both: results must not share memory.
    return for_qkv, parts[0].sum(0).to(q_weight.dtype), parts[1].sum(0).to(k_weight.dtype)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


SHIPPED_HEADS = ((32, 40), (32, 64), (32, 72), (28, 96), (32, 128), (2, 72))
"""(heads, head_dim) of the shipped models."""


def variants() -> Iterator[Variant]:
    strides = tuple(f"{tensor}_{axis}" for tensor in "qkv" for axis in ("batch", "token", "head"))
    for num_heads, head_dim in SHIPPED_HEADS:
        for weight in (None, torch.float32, torch.bfloat16):
            for kernel in (qk_rope_kernel, qk_rope_backward_kernel):
                backward = kernel is qk_rope_backward_kernel
                types = dict.fromkeys(
                    ("for_q", "for_k", "for_v", "qkv", "q", "k", "v", "for_qkv"), f"*{ELEMENT[torch.bfloat16]}"
                )
                types |= dict.fromkeys(("cos", "sin", "for_weights"), f"*{ELEMENT[torch.float32]}")
                types |= dict.fromkeys(("items", "T", "qkv_stride", *strides), "i32") | {"eps": "fp32"}
                constants = shape_of(num_heads, head_dim) | {"NORM": weight is not None}
                num_warps = constants.pop("num_warps")
                if weight is None:
                    absent = ("q_weight", "k_weight", *(("qkv", "for_weights") if backward else ()))
                    constants |= dict.fromkeys(absent)
                else:
                    types |= dict.fromkeys(("q_weight", "k_weight"), f"*{ELEMENT[weight]}")
                direction = "backward" if backward else "forward"
                norm = "" if weight is None else f"_norm_{ELEMENT[weight]}"
                yield Variant(
                    name=f"qk_rope_{direction}{norm}_{num_heads}x{head_dim}",
                    kernel=kernel,
                    types={name: types[name] for name in kernel.arg_names if name not in constants},
                    constants=constants,
                    divisible=("T", "qkv_stride", *strides),
                    num_warps=num_warps,
                )
