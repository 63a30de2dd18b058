"""The two ends of a flow matching step, with noise that is drawn where it is used and never stored.

    flow_interpolate       x         -> x_t = (1 - t) x + t eps         before the model
    flow_matching_loss     v, x      -> mean of (v - (eps - x))^2       after it

Both draw eps = philox_normal(seed, step, sample_index, (T, C), stream), so the loss knows the noise that was put in
without being given it. The integers are the same everywhere; logarithm, sine and cosine differ in their last bits
between devices, as they do in `philox_normal`.

For backward the loss keeps v - (eps - x) in the type of the arithmetic, so that the gradient is rounded once. Nothing
is kept where v needs no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rae_kernels import flow_operators as operators
from rae_kernels.dispatch import plain
from rae_kernels.philox import SEED_BITS, STEP_BITS, STREAM_BITS, check_range
from rae_kernels.spec import flow as spec


def flow_interpolate(x: Tensor, t: Tensor, *, seed: int, step: int, sample_index: Tensor, stream: int) -> Tensor:
    """(1 - t) x + t eps, [B, T, C] in the type of x: data at t = 0, noise at t = 1. It has no gradient.

    x: [B, T, C] and t: [B], constants of floating types.
    seed, step, sample_index [B], stream: of the noise, as for `philox_normal`.

    Raises:
        ValueError: x or t requires a gradient, shapes do not fit, or a number has no place in the Philox counter.
    """
    check_noise(x, seed, step, sample_index, stream)
    check_constants(x=x, t=t)
    check_per_sample(x, t=t)
    run = spec.flow_interpolate if plain(x) else operators.flow_interpolate
    return run(x, t, sample_index, signed(seed), step, stream)


def flow_matching_loss(
    velocity: Tensor,
    x: Tensor,
    *,
    seed: int,
    step: int,
    sample_index: Tensor,
    stream: int,
    first_token: int = 0,
    weight: Tensor | None = None,
) -> Tensor:
    """Each sample's mean squared error of the velocity against eps - x, times its weight: float32 [B].

    velocity: [B, P, C] at the tokens first_token ... first_token + P - 1, all or a share; the mean is over these.
    x: [B, T, C] clean data of all tokens, a constant. weight: [B].
    seed, step, sample_index [B], stream: of the noise, as for `philox_normal` and the same as for `flow_interpolate`.
    The batch is not averaged. The result is float64 if velocity or x is.

    Raises:
        ValueError: x requires a gradient, shapes do not fit, or a number has no place in the Philox counter.
    """
    check_noise(x, seed, step, sample_index, stream)
    check_constants(x=x)
    check_tokens(velocity, x, first_token)
    where = sample_index, signed(seed), step, stream, first_token
    if plain(velocity):
        loss = spec.mean_square(spec.difference(velocity, x, *where))
    else:
        keep = velocity.requires_grad and torch.is_grad_enabled()
        loss = operators.flow_matching_loss(velocity, x, *where, keep)[0]
    if weight is None:
        return loss
    check_per_sample(x, weight=weight)
    return loss * weight


def signed(seed: int) -> int:
    """The same 64 bits as an integer that an operator can take."""
    return seed - 2**SEED_BITS if seed >= 2 ** (SEED_BITS - 1) else seed


def check_noise(x: Tensor, seed: int, step: int, sample_index: Tensor, stream: int) -> None:
    check_range("seed", seed, SEED_BITS)
    check_range("step", step, STEP_BITS)
    check_range("stream", stream, STREAM_BITS)
    if x.dim() != 3:
        raise ValueError(f"x is {list(x.shape)}; it must be [B, T, C]")
    if sample_index.dtype != torch.int64 or sample_index.shape != x.shape[:1]:
        raise ValueError(
            f"sample_index is {sample_index.dtype} {list(sample_index.shape)}; it must be int64 [{x.shape[0]}], one "
            "for each sample of x"
        )


def check_constants(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, but it is data here and gets none; pass {name}.detach(), or use "
                "philox_normal and the formula itself"
            )


def check_per_sample(x: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != x.shape[:1]:
            raise ValueError(f"{name} is {list(tensor.shape)}; it must be [{x.shape[0]}], one for each sample of x")


def check_tokens(velocity: Tensor, x: Tensor, first_token: int) -> None:
    batch, tokens, channels = x.shape
    if velocity.dim() != 3 or (velocity.shape[0], velocity.shape[2]) != (batch, channels):
        raise ValueError(
            f"velocity is {list(velocity.shape)}; with x {list(x.shape)} it must be [{batch}, P, {channels}]"
        )
    if not 0 <= first_token <= tokens - velocity.shape[1]:
        raise ValueError(
            f"first_token={first_token} with a velocity of {velocity.shape[1]} tokens: x has the tokens 0 to "
            f"{tokens - 1} only"
        )
