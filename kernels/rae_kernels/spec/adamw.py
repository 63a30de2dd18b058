"""AdamW, clipping, a bfloat16 copy of the weight and its moving average in plain PyTorch.

`update` states the arithmetic, operation by operation: the CUDA kernel gives its bits. `fused_update` is what runs
where there is no kernel: PyTorch's own AdamW, equal to a rounding or two. PyTorch has none for moments in bfloat16, so
there `update` runs itself.

Moments in bfloat16 are rounded at random, up or down with the probability that leaves their expectation exact. Rounding
to nearest would lose every change of less than 1/512 of the value, and exp_avg_sq with beta2 = 0.999 changes by 1/1000.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rae_kernels.philox import MASK32, SAMPLE_BITS, SEED_BITS, STEP_BITS, check_range, philox_4x32

ROUNDING_STREAM = 0xADA0
"""Place in the Philox counter that tells these numbers from those of other uses."""

BLOCK = 1 << 20
"""Elements that `update` takes at a time where it runs itself: their random words take 32 bytes each on the way."""


class Scalars(NamedTuple):
    """What all elements share, each a float32 number. The kernel takes them in this order."""

    clip_factor: float
    decay: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    inverse_root: float
    eps: float
    minus_step_size: float
    ema_decay: float
    one_minus_ema_decay: float


class Random(NamedTuple):
    """Key and step of the random numbers that round moments."""

    seed: int
    step: int


def scalars(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    clip_factor: float,
    ema_decay: float,
) -> Scalars:
    """Bias correction and the rest in double precision, as PyTorch computes them. step: 1 at the first update."""
    beta1, beta2 = betas
    exact = Scalars(
        clip_factor=clip_factor,
        decay=1 - lr * weight_decay,
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        inverse_root=1 / math.sqrt(1 - beta2**step),
        eps=eps,
        minus_step_size=-lr / (1 - beta1**step),
        ema_decay=ema_decay,
        one_minus_ema_decay=1 - ema_decay,
    )
    return Scalars(*(ctypes.c_float(number).value for number in exact))


def update(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor | None, s: Scalars
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The new weight, exp_avg, exp_avg_sq and moving average, float32, from tensors of one shape."""
    gradient = gradient.float() * s.clip_factor
    exp_avg = lerp(exp_avg.float(), gradient, s.one_minus_beta1, s.beta1)
    exp_avg_sq = exp_avg_sq.float() * s.beta2 + (gradient * s.one_minus_beta2) * gradient
    root = exp_avg_sq.double().sqrt().float()  # on a CPU, PyTorch's float32 root is not always the nearest number
    weight = weight * s.decay + (exp_avg * s.minus_step_size) / (root * s.inverse_root + s.eps)
    if ema is not None:
        ema = lerp(ema, weight, s.one_minus_ema_decay, s.ema_decay)
    return weight, exp_avg, exp_avg_sq, ema


def lerp(start: Tensor, end: Tensor, weight: float, one_minus_weight: float) -> Tensor:
    """start + weight * (end - start), from the nearer end: torch.lerp, but with every rounding that is written."""
    way = end - start
    return start + way * weight if weight < 0.5 else end - way * one_minus_weight


def update_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    copy: Tensor | None,
    s: Scalars,
    random: Random,
    parameter: int,
    first_element: int,
) -> None:
    """`update` in place, on flat tensors [N], with moments rounded to their type."""
    for begin in range(0, weight.numel(), BLOCK):
        part = slice(begin, begin + BLOCK)
        average = None if ema is None else ema[part]
        new = update(weight[part], gradient[part], exp_avg[part], exp_avg_sq[part], average, s)
        weight[part], moments = new[0], new[1:3]
        if exp_avg.dtype == torch.bfloat16:
            words = rounding_words(random, parameter, first_element + begin, new[0].numel(), weight.device)
            moments = round_at_random(moments[0], words & 0xFFFF), round_at_random(moments[1], words >> 16)
        exp_avg[part], exp_avg_sq[part] = moments
        if average is not None and new[3] is not None:
            average.copy_(new[3])
        if copy is not None:
            copy[part] = new[0]


def fused_update(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    clip_factor: float,
    ema_decay: float,
) -> None:
    """The whole step for float32 moments by PyTorch's AdamW. The gradients are scaled in place."""
    gradients = [gradient.float() for gradient in gradients]
    if clip_factor != 1:
        torch._foreach_mul_(gradients, clip_factor)
    count = torch.full((), step, dtype=torch.float32, device=weights[0].device)
    torch._fused_adamw_(
        list(weights),
        gradients,
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        [count] * len(weights),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    if emas:
        torch._foreach_lerp_(list(emas), list(weights), 1 - ema_decay)
    if copies:
        torch._foreach_copy_(list(copies), list(weights))


def rounding_words(random: Random, parameter: int, first: int, count: int, device: torch.device) -> Tensor:
    """Random words of elements `first` to `first` + `count` of a parameter: int64 [count], below 2**32.

    The counter is that of `rae_kernels.philox`, with the parameter for the sample. The lower 16 bits of a word round
    exp_avg, the upper ones exp_avg_sq.
    """
    check_range("seed", random.seed, SEED_BITS)
    check_range("step", random.step, STEP_BITS)
    check_range("parameter", parameter, SAMPLE_BITS)
    groups = torch.arange(first // 4, (first + count + 3) // 4, device=device)
    c0 = groups & MASK32
    c1 = torch.full_like(c0, parameter & MASK32)
    c2 = torch.full_like(c0, (parameter >> 32) | (ROUNDING_STREAM << 16))
    c3 = torch.full_like(c0, random.step)
    words = torch.stack(philox_4x32(c0, c1, c2, c3, random.seed), dim=-1).flatten()
    return words[first % 4 :][:count]


def round_at_random(x: Tensor, bits: Tensor) -> Tensor:
    """float32 `x` in bfloat16: the neighbour away from 0 where `bits`, uniform below 2**16, carry into it."""
    raised = (x.view(torch.int32) + bits.to(torch.int32)) & ~0xFFFF
    return torch.where(x.isfinite(), raised.view(torch.float32), x).to(torch.bfloat16)
