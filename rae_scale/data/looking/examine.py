"""What samples are like, counted: shared by `inspect`, which shows the gist, and `stats`, which shows distributions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rae_scale.data.decode import DEFAULT_MAX_PIXELS, ImageHeader, read_header
from rae_scale.data.looking.distribution import Distribution
from rae_scale.data.record import BadSample, Sample
from rae_scale.data.sources import Item

PREVIEWS = 5

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Preview:
    key: str
    text: str
    image: str


@dataclass
class Examined:
    """Counts over some samples; `merge` adds those of others. Images are measured by their headers, not decoded.

    items:    all that were examined: `items == usable + sum(rejected.values())`.
    rejected: samples that cannot be used, by reason.
    tokens:   per caption, empty without a tokenizer.
    """

    items: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    text_only: int = 0
    conversations: int = 0
    captions: int = 0
    width: Distribution = field(default_factory=Distribution)
    height: Distribution = field(default_factory=Distribution)
    aspect: Distribution = field(default_factory=lambda: Distribution(step=0.01))
    image_bytes: Distribution = field(default_factory=lambda: Distribution(step=64))
    characters: Distribution = field(default_factory=Distribution)
    tokens: Distribution = field(default_factory=Distribution)
    captions_per_image: Distribution = field(default_factory=Distribution)
    previews: list[Preview] = field(default_factory=list)

    @property
    def usable(self) -> int:
        return self.items - self.rejected.total()

    @property
    def distributions(self) -> dict[str, Distribution]:
        """By the name that reports and plots call it."""
        return {
            "image width, pixels": self.width,
            "image height, pixels": self.height,
            "aspect, width / height": self.aspect,
            "image file, bytes": self.image_bytes,
            "caption, characters": self.characters,
            "caption, tokens": self.tokens,
            "captions per image": self.captions_per_image,
        }

    def add(self, item: Item, count_tokens: CountTokens | None = None) -> None:
        self.items += 1
        try:
            self.add_sample(item, count_tokens)
        except BadSample as problem:
            self.rejected[problem.reason] += 1

    def add_sample(self, item: Item, count_tokens: CountTokens | None) -> None:
        sample = item.sample
        if sample is None:
            assert item.problem is not None
            raise item.problem
        header = None if sample.image is None else read_header(sample.image, DEFAULT_MAX_PIXELS)
        self.layouts[item.layout] += 1
        self.conversations += bool(sample.turns)
        self.captions += len(sample.captions)
        for caption in sample.captions:
            self.characters.add(len(caption))
            if count_tokens is not None:
                self.tokens.add(count_tokens(caption))
        if header is None or sample.image is None:
            self.text_only += 1
        else:
            self.add_image(header, len(sample.image))
            self.captions_per_image.add(len(sample.captions))
        if len(self.previews) < PREVIEWS:
            image = f"{header.format} {header.width} x {header.height}" if header else "none"
            self.previews.append(Preview(sample.key, preview_text(sample), image))

    def add_image(self, header: ImageHeader, size: int) -> None:
        self.formats[header.format] += 1
        self.width.add(header.width)
        self.height.add(header.height)
        self.aspect.add(header.width / header.height)
        self.image_bytes.add(size)

    def merge(self, other: Examined) -> None:
        self.items += other.items
        self.text_only += other.text_only
        self.conversations += other.conversations
        self.captions += other.captions
        self.rejected.update(other.rejected)
        self.layouts.update(other.layouts)
        self.formats.update(other.formats)
        for name, distribution in self.distributions.items():
            distribution.merge(other.distributions[name])
        self.previews = (self.previews + other.previews)[:PREVIEWS]


def examine(items: Iterable[Item], count_tokens: CountTokens | None = None) -> Examined:
    found = Examined()
    for item in items:
        found.add(item, count_tokens)
    return found


def preview_text(sample: Sample) -> str:
    if sample.turns:
        return " | ".join(f"{turn.role}: {turn.value}" for turn in sample.turns)
    return sample.captions[0] if sample.captions else ""
