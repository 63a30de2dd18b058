"""The one sample record: captioned images (text to image) and conversations (understanding) share it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    from rae_scale.data.latents.numbers import Latents

Role = Literal["human", "gpt"]
IMAGE_PLACEHOLDER = "<image>"
ANSWER_WITH_IMAGE = f"Here you go:\n{IMAGE_PLACEHOLDER}"


class BadSample(ValueError):
    """A sample that cannot be used. `reason` is one or two words to count by; the message adds the detail.

    Whatever prepares samples raises this (or a subclass): the sample is then listed and replaced, never a crash.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. `<image>` in `value` marks where the sample's image stands."""

    role: Role
    value: str


@dataclass(frozen=True)
class Sample:
    """What a shard holds for one sample. Has captions or turns (or both: then the turns are used).

    image:           the encoded file (JPEG, PNG, WebP), exactly as it was built; None for text only.
    captions:        descriptions of the image, the preferred one first.
    caption_weights: how often each is to be seen, in proportion; empty states no preference.

    Raises ValueError for weights that do not belong to the captions, or that nothing can be drawn by.
    """

    key: str
    image: bytes | None
    captions: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    caption_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.caption_weights:
            check_weights(self.caption_weights, len(self.captions), self.key)

    def conversation(self, prompt_template: str) -> tuple[Turn, ...]:
        """The sample as turns: its own, or its first caption as a request answered by the image.

        `prompt_template` holds `{caption}`. The answer's wording is the official release's (docs/Train.md).
        """
        if self.turns:
            return self.turns
        if not self.captions:
            raise ValueError(f"sample {self.key!r} has neither turns nor a caption; rebuild its shards from the tars")
        # str.replace, not str.format: captions and templates may hold braces of their own.
        request = prompt_template.replace("{caption}", self.captions[0])
        return (Turn("human", request), Turn("gpt", ANSWER_WITH_IMAGE))


def check_weights(weights: tuple[float, ...], count: int, key: str) -> None:
    if len(weights) != count:
        raise ValueError(f"sample {key!r} has {len(weights)} caption_weights for {count} captions; give one for each")
    if not all(type(weight) in (int, float) and 0 <= weight < math.inf for weight in weights):
        raise ValueError(f"sample {key!r}: caption_weights {weights} must be finite numbers from 0 on")
    if not 0 < sum(weights) < math.inf:
        raise ValueError(f"sample {key!r}: caption_weights {weights} must have a finite sum above 0")


@dataclass(frozen=True)
class DecodedSample:
    """A sample at its place in the data order, its image decoded and resized.

    sample_index: global position in the infinite data order; noise, time and dropout are functions of it.
    sample_id:    where the sample lies, for messages: `folder:index:key`, then `:caption N` (from 0) if one was drawn.
    sample:       with the drawn caption alone, if one was.
    pixels:       uint8 `[size, size, 3]`, None when the sample has no image or its latents are given.
    latents:      from a latent cache, zeros when the sample has no image; None without a cache.
    """

    sample_index: int
    sample_id: str
    sample: Sample
    pixels: np.ndarray | None
    latents: Latents | None = None

    @property
    def has_image(self) -> bool:
        return self.sample.image is not None
