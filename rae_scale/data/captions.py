"""Which of a sample's captions a step sees.

To leave the caption out altogether is the model's part (`model.dit.class_dropout_prob`): it then generates from the
null vector that guidance needs when sampling.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from rae_scale.data.draws import Draw, uniform
from rae_scale.data.record import Sample


def draw_caption(sample: Sample, seed: int, sample_index: int) -> tuple[Sample, int]:
    """The sample with one of its captions, drawn by `caption_weights`, and that caption's number.

    Captions without stated weights are equally likely; a weight of 0 leaves one out. A sample with fewer than two
    captions is returned as it is.
    """
    if len(sample.captions) < 2:
        return sample, 0
    ends = list(accumulate(sample.caption_weights or (1,) * len(sample.captions)))
    aim = uniform(seed, sample_index, Draw.CAPTION) * ends[-1]
    number = next(number for number, end in enumerate(ends) if aim < end)
    return replace(sample, captions=(sample.captions[number],), caption_weights=()), number
