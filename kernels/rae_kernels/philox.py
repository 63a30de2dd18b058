"""Counter-based random numbers: noise is a function of where it is used, not of what was drawn before.

Philox4x32-10 (Salmon et al., SC 2011) turns a 64-bit key and a 128-bit counter into four 32-bit words. The layout:

    key      seed (64 bits)
    c0       element // 4            which group of four elements of the sample, row-major
    c1       sample_index, bits 0 to 31
    c2       sample_index, bits 32 to 47, and stream << 16
    c3       step (32 bits)

Every field has bits of its own, so no two (seed, step, sample_index, stream, element) share a number. The four words of
one call serve elements 4 * c0 to 4 * c0 + 3, hence a longer sample begins with the numbers of a shorter one.

The integers are those of `triton.language.philox(seed, c0, c1, c2, c3)` on 32-bit counters, and the maps to uniform and
normal numbers are those of `tl.rand4x` and `tl.randn4x`: a Triton kernel with this layout draws the same noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_2 = 0xD2511F53, 0xCD9E8D57
KEY_INCREMENT_LOW, KEY_INCREMENT_HIGH = 0x9E3779B9, 0xBB67AE85
MASK32 = 0xFFFFFFFF

SEED_BITS, STEP_BITS, STREAM_BITS, SAMPLE_BITS = 64, 32, 16, 48
WORDS_PER_COUNTER = 4

# Triton's constants. The scale is just below 2**-31, so that the largest integer still maps below 1.
UNIFORM_SCALE = 4.6566127342e-10
SMALLEST_UNIFORM = 1.0e-7


def philox_normal(seed: int, step: int, sample_index: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
    """Standard normal float32 numbers [B, *shape], on the device of `sample_index`.

    seed: below 2**64. step: below 2**32. stream: below 2**16, tells apart the uses of one sample in one step.
    sample_index: int64 [B], values below 2**48.
    Raises ValueError for a seed, step or stream out of its range, and for a `sample_index` of another type or rank.
    """
    uniform = uniform_groups(seed, step, sample_index, math.prod(shape), stream)
    return crop(box_muller(uniform), shape)


def philox_uniform(seed: int, step: int, sample_index: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
    """Uniform float32 numbers in [0, 1), [B, *shape]. Arguments and errors as for `philox_normal`."""
    return crop(uniform_groups(seed, step, sample_index, math.prod(shape), stream), shape)


def philox_words(seed: int, step: int, sample_index: Tensor, num_groups: int, stream: int) -> Tensor:
    """The raw words of counters c0 = 0 ... num_groups - 1: int64 [B, num_groups, 4], values in [0, 2**32)."""
    check_range("seed", seed, SEED_BITS)
    check_range("step", step, STEP_BITS)
    check_range("stream", stream, STREAM_BITS)
    if sample_index.dtype != torch.int64 or sample_index.dim() != 1:
        raise ValueError(
            f"sample_index is {sample_index.dtype} of shape {tuple(sample_index.shape)}: it must be int64 [B], because "
            "it counts every sample of a run; build it with dtype=torch.int64"
        )
    # Axes [B, num_groups]. The counter's words broadcast against each other, so the first rounds work on [B, 1] and
    # [1, num_groups] only.
    c0 = torch.arange(num_groups, dtype=torch.int64, device=sample_index.device)[None, :]
    c1 = sample_index[:, None] & MASK32
    c2 = (sample_index[:, None] >> 32) | (stream << 16)
    c3 = torch.full_like(c1, step)
    words = philox_4x32(c0, c1, c2, c3, seed)
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def philox_4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten Philox rounds on counters held as int64 in [0, 2**32), broadcast against each other. Returns four words.

    int64 products wrap modulo 2**64, which leaves exactly the bits of the unsigned 64-bit product: the low word is
    under the mask, the high word is what an arithmetic shift leaves there.
    """
    key_low, key_high = seed & MASK32, seed >> 32
    for _ in range(ROUNDS):
        product_0, product_2 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_2
        # c1 and c3 keep the whole product: only their low words count, and the masks of the next round drop the rest.
        c0 = ((product_2 >> 32) ^ c1 ^ key_low) & MASK32
        c2 = ((product_0 >> 32) ^ c3 ^ key_high) & MASK32
        c1, c3 = product_2, product_0
        key_low = (key_low + KEY_INCREMENT_LOW) & MASK32
        key_high = (key_high + KEY_INCREMENT_HIGH) & MASK32
    return c0, c1 & MASK32, c2, c3 & MASK32


def uniform_groups(seed: int, step: int, sample_index: Tensor, numel: int, stream: int) -> Tensor:
    """Uniform float32 [B, num_groups, 4] with at least `numel` numbers a sample."""
    num_groups = -(-numel // WORDS_PER_COUNTER)
    words = philox_words(seed, step, sample_index, num_groups, stream).to(torch.int32)
    magnitude = words ^ (words >> 31)  # Triton's fold of the sign: ~x where x < 0
    return magnitude.to(torch.float32) * UNIFORM_SCALE


def box_muller(uniform: Tensor) -> Tensor:
    """Normal numbers from uniform ones, [..., 4] -> [..., 4]: (0, 1) make the first two, (2, 3) the others."""
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2].clamp_min(SMALLEST_UNIFORM)))
    angle = uniform[..., 1::2] * (2.0 * math.pi)
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)


def crop(groups: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[B, num_groups, 4] -> [B, *shape], without the numbers of the last group that the shape does not need."""
    batch = groups.shape[0]
    return groups.reshape(batch, -1)[:, : math.prod(shape)].reshape(batch, *shape)


def check_range(name: str, value: int, bits: int) -> None:
    if not 0 <= value < 2**bits:
        raise ValueError(
            f"{name}={value} has no place in the Philox counter: it must be at least 0 and below 2**{bits}"
        )
