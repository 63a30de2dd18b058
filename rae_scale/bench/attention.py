"""Every backend of scaled_dot_product_attention at the shapes of the DiT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import rae_kernels
from rae_scale.bench.timing import measure

BACKENDS: dict[str, SDPBackend | None] = {
    "ours": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PUBLISHED_SHAPES = [(32, 40), (32, 64), (32, 72), (32, 96), (32, 128), (21, 128)]
"""Heads and head_dim of the DiTs from 0.5B to 9.8B, and of the wide DDT head."""

PUBLISHED_LENGTHS = [256, 576, 1024, 2304, 4096]

MATH_TOKENS = 1024
"""Up to which `math`, which stores all scores, is run."""

COLUMNS = {
    "tokens": "{tokens}",
    "heads x D": "{heads} x {head_dim}",
    "images": "{batch}",
    "backend": "{backend}",
    "forward ms": "{forward_ms:.3f}",
    "TFLOP/s": "{forward_tflops:.0f}",
    "backward ms": "{backward_ms:.3f}",
    "TFLOP/s ": "{backward_tflops:.0f}",
    "refused": "{refused}",
}


def bench_attention(
    shapes: Sequence[tuple[int, int]], lengths: Sequence[int], total_tokens: int, device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """shapes: (heads, head_dim). A batch has `total_tokens` in all, at least one image. "ours" is
    `rae_kernels.attention`, which chooses. FLOPs of backward are counted as 2.5 times the forward's, as flash does it.
    """
    for heads, head_dim in shapes:
        for tokens in lengths:
            batch = max(1, total_tokens // tokens)
            q, k, v, gradient = (
                torch.randn(batch, tokens, heads, head_dim, device=device, dtype=torch.bfloat16) for _ in range(4)
            )
            inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
            flops = 4.0 * batch * tokens * tokens * heads * head_dim
            for name, backend in BACKENDS.items():
                row = {"backend": name, "tokens": tokens, "heads": heads, "head_dim": head_dim, "batch": batch}
                if name == "math" and tokens > MATH_TOKENS:
                    continue
                try:
                    yield row | time_attention(function_of(backend), inputs, gradient, flops, device, repeats)
                except RuntimeError as error:  # no kernel of this backend, or its scores do not fit
                    yield row | {"refused": str(error).splitlines()[0][:120]}


def function_of(backend: SDPBackend | None) -> Callable[..., Tensor]:
    if backend is None:
        return rae_kernels.attention

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    return run


def time_attention(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    gradient: Tensor,
    flops: float,
    device: torch.device,
    repeats: int,
) -> dict[str, float]:
    forward = measure([lambda: function(*inputs)], device, repeats=repeats)
    out = function(*inputs)
    backward = measure(
        [lambda: torch.autograd.grad(out, list(inputs), gradient, retain_graph=True)], device, repeats=repeats
    )
    return {
        "forward_ms": 1e3 * forward.median,
        "forward_tflops": flops / forward.median / 1e12,
        "backward_ms": 1e3 * backward.median,
        "backward_tflops": 2.5 * flops / backward.median / 1e12,
    }
