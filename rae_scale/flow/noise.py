"""Every random number of training and sampling, as a function of (seed, step, sample index).

Nothing here holds a state, so losses do not depend on the number of processes, the micro-batch size or a restart.
"""

from __future__ import annotations

from enum import IntEnum

from torch import Tensor

from rae_scale import ops


class Stream(IntEnum):
    """What a number is used for. Uses of one sample in one step must not share numbers.

    The values are part of what makes a run reproducible: never renumber them.
    """

    NOISE = 0
    """eps of the path: `ops.flow_interpolate` and `ops.flow_matching_loss` draw it inside."""
    TIME = 1
    DROP = 2
    SAMPLER = 3


def sampling_noise(seed: int, sample_index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The noise that sampling starts from, float32 [B, *shape]. sample_index: int64 [B], counts pictures of a seed."""
    return ops.philox_normal(seed, 0, sample_index, shape, Stream.SAMPLER)


def drop_mask(seed: int, step: int, sample_index: Tensor, prob: float) -> Tensor:
    """bool [B]: the samples whose condition is dropped, each with probability `prob` (classifier-free guidance)."""
    return ops.philox_uniform(seed, step, sample_index, (), Stream.DROP) < prob
