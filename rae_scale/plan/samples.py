"""What a plan takes the samples of a run to be, on average."""

from __future__ import annotations

from dataclasses import dataclass

from rae_scale.config import Config
from rae_scale.plan.models import generator
from rae_scale.train.parts import GENERATION_STAGES

MARKUP_TOKENS = 32
CAPTION_TOKENS = 64
LABELLED_TOKENS = 8


@dataclass(frozen=True)
class Samples:
    """What a sample is on average.

    tokens:   of its text, image slots included. ChatML, template and system prompt are 32 (`rae_scale/data/chat.py`);
              for the caption there is no number but the data's own, and 64 stands for a few sentences.
    labelled: tokens with a label: the assistant's "Here you go:", the ends of image and turn.
    squared:  mean of the squared tokens, which is what attention costs; None takes all samples as equally long.
    answers:  the fraction whose image is generated; the images of the others are read.
    """

    tokens: float
    labelled: float = LABELLED_TOKENS
    squared: float | None = None
    answers: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.labelled <= self.tokens:
            raise ValueError(f"samples of {self.tokens} tokens, {self.labelled} of them labelled; there can be no more")
        if not 0 <= self.answers <= 1:
            raise ValueError(f"answers={self.answers} is a fraction of the samples; choose 0 to 1")

    @property
    def tokens_squared(self) -> float:
        return self.tokens**2 if self.squared is None else self.squared


def usual_samples(config: Config) -> Samples:
    """Captioned images, with captions of `CAPTION_TOKENS`."""
    if config.stage not in GENERATION_STAGES:
        return Samples(CAPTION_TOKENS, 0)
    length = generator(config).num_tokens + MARKUP_TOKENS + CAPTION_TOKENS
    return Samples(min(length, config.data.max_seq_len))
