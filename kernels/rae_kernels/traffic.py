"""What the operations of a DiT block read and write: bytes in closed form, and the widths that they depend on.

Letters: h hidden size, F padded width of SwiGLU, z width of the condition. Bytes per token are written as bytes per
channel times channels: residual stream and its gradient in `residual` bytes, everything that matrix products read or
write in bf16 (2 bytes). Two ways to compute are set side by side: `eager`, the reference functions one PyTorch call at
a time under bf16 autocast, and `fused`, our operators.

Used by `kernels/bench/roofline.py` and by the planner of `rae_scale`. Plain arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

FOURIER_FEATURES = 512
SWIGLU_MULTIPLE = 128
FLASH_BACKWARD = 2.5
"""Of attention's forward: five products instead of two, one of them computed again."""


class Traffic(NamedTuple):
    """Bytes per token and channel, or per parameter."""

    forward: float
    backward: float


def padded_inner(hidden: int) -> int:
    return -(-(8 * hidden // 3) // SWIGLU_MULTIPLE) * SWIGLU_MULTIPLE


def fused_traffic(residual: int = 4, *, product: int = 2, recompute_swiglu: bool = True) -> dict[str, Traffic]:
    """Of each operator, per channel of h (`swiglu`: of F). product: bytes of what matrix products read and write."""
    r, a = residual, product
    return {
        # x shift scale -> h                      dh x scale -> dx dshift dscale
        "norm_modulate": Traffic(r + 3 * a, 2 * r + 4 * a),
        # x y gate shift scale -> x' h            dx' dh x y gate scale -> dx dy dgate dshift dscale
        "gated_residual_norm_modulate": Traffic(2 * r + 5 * a, 3 * r + 8 * a),
        # x y gate -> x'                          dx' y gate -> dy dgate; dx is dx'
        "gated_residual": Traffic(2 * r + 2 * a, r + 4 * a),
        # q k v -> q k v                          and back
        "qk_norm_rope": Traffic(6 * a, 6 * a),
        # gate value -> out                       dout gate value -> dgate dvalue, and out once more for w3's gradient
        "swiglu": Traffic(3 * a, 5 * a + (3 * a if recompute_swiglu else 0)),
        # autograd adds what comes through the first norm of a block to what comes past it
        "residual gradient sum": Traffic(0, 3 * r),
    }


def eager_traffic(residual: int = 4) -> dict[str, Traffic]:
    """Of each operator's reference function, every PyTorch call counted, casts of autocast included.

    residual: 4 only, where the counts come from: other types change the casts as well.
    """
    if residual != 4:
        raise ValueError(f"residual={residual}: the eager passes were counted for a float32 residual (4 bytes)")
    norm = Traffic(58, 132)
    gated = Traffic(16, 18)
    return {
        "norm_modulate": norm,
        # The block's own sum of gradients is inside.
        "gated_residual_norm_modulate": Traffic(norm.forward + gated.forward, norm.backward + gated.backward + 12),
        "gated_residual": gated,
        "qk_norm_rope": Traffic(76, 120),
        "swiglu": Traffic(10, 26),
        "residual gradient sum": Traffic(0, 12),
        # The six parts of the modulation's gradient are put together.
        "modulation gradient": Traffic(0, 24),
    }


# What neither way fuses. Per channel of the width given in `unfused`.
BIAS_GRADIENTS = Traffic(0, 2)
CONDITION = Traffic(6, 18)  # cast to bf16 for each block; its gradient cast back and added up in float32

# Per parameter, read and written: gradient norm, clip, AdamW, EMA, weight cast to bf16, gradient cast to float32.
EAGER_OPTIMIZER = {"norm": 4, "clip": 8, "adamw": 28, "ema": 12, "weight cast": 6, "gradient cast": 6}
FUSED_OPTIMIZER = {"norm": 4, "adamw + clip + ema + cast": 38, "gradient cast": 6}


def linear_widths(hidden: int, z: int) -> list[tuple[int, int]]:
    """(in, out) of a block's products: qkv, proj, w12, w3, adaLN."""
    inner = padded_inner(hidden)
    return [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden), (z, 6 * hidden)]
