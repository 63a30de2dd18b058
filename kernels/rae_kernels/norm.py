"""RMSNorm and the two halves of adaptive layer norm (adaLN): modulation and the gated residual.

The functions cover what lies between two matrix products of a DiT block in one pass each way:

    norm_modulate                    x                 -> h                  before a branch
    gated_residual_norm_modulate     x, branch y       -> x + gate y, h      between two branches
    gated_residual                   x, branch y       -> x + gate y         after the last one

Results that a product reads have autocast's type inside torch.autocast, otherwise the promoted one. Statistics and all
other arithmetic are float32 (float64 for float64 input), rounded once. What is kept for backward are the inputs, which
exist anyway, and one number per row; the sum x + gate y is formed again.
"""

from __future__ import annotations

from torch import Tensor

from rae_kernels import norm_operators as operators
from rae_kernels.dispatch import compute_dtype, plain
from rae_kernels.spec import norm as spec


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale `x` [..., C] to unit root mean square over its last dimension, times `weight` [C]. In the type of x."""
    if plain(x):
        return spec.rms_norm(x, weight, eps)
    return operators.norm(x, weight, None, None, None, x.shape[-1], eps, x.dtype)[0]


def norm_modulate(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """rms_norm(x) * (1 + scale) + shift. x, shift, scale: [..., C], weight: [C].

    shift and scale hold one vector per token, as Scale-RAE's condition does, and may be `chunks` of a packed tensor.
    Raises ValueError if their shape is not that of x.
    """
    check_shapes(x, shift=shift, scale=scale)
    if plain(x):
        return spec.modulate(spec.rms_norm(x, weight, eps), shift, scale)
    dtype = compute_dtype(x, shift, scale)
    return operators.norm(x, weight, shift, scale, None, x.shape[-1], eps, dtype)[0]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y, the residual x [..., C] plus a branch's output. Ordinary type promotion; shapes must be equal."""
    check_shapes(x, y=y, gate=gate)
    if plain(x):
        return spec.gated_residual(x, y, gate)
    return operators.gated_residual(x, y, gate, False)[0]


def gated_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`gated_residual` and `norm_modulate` of its result: (x + gate * y, h). Shapes and types as there."""
    check_shapes(x, y=y, gate=gate, shift=shift, scale=scale)
    if plain(x):
        x = spec.gated_residual(x, y, gate)
        return x, spec.modulate(spec.rms_norm(x, weight, eps), shift, scale)
    dtype = compute_dtype(x, y, gate, shift, scale)
    return operators.gated_residual_norm(x, y, gate, weight, shift, scale, eps, dtype)[:2]


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum of the squares of `x` [..., C] over its last dimension, [..., 1], float32 (float64 for float64 input).

    With `norm_modulate_from_sum` it is `norm_modulate` for channels that are spread over several processes.
    """
    return spec.sum_of_squares(x) if plain(x) else operators.sum_of_squares(x)


def norm_modulate_from_sum(
    x: Tensor, total: Tensor, channels: int, weight: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """`norm_modulate` of a slice of the channels, given the sum of squares of all of them.

    x, shift, scale: [..., C] and weight: [C], of the slice; total: [..., 1], over all `channels`.
    """
    check_shapes(x, shift=shift, scale=scale)
    if plain(x):
        return spec.modulate(spec.rms_norm_from_sum(x, total, channels, weight, eps), shift, scale)
    return operators.norm(x, weight, shift, scale, total, channels, eps, compute_dtype(x, shift, scale))[0]


def gated_residual_sum(x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """`gated_residual` and the `sum_of_squares` of its result."""
    check_shapes(x, y=y, gate=gate)
    if plain(x):
        x = spec.gated_residual(x, y, gate)
        return x, spec.sum_of_squares(x)
    return operators.gated_residual(x, y, gate, True)


def check_shapes(x: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.shape != x.shape:
            raise ValueError(
                f"{name} is {list(other.shape)}, but x is {list(x.shape)}: there is one vector per token; expand one "
                "that several tokens share"
            )
