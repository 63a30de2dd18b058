"""BLIP3o's set for instruction tuning."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from rae_scale.data.adapters.base import Damage, Item
from rae_scale.data.adapters.blip3o import Blip3o
from rae_scale.data.tars import TAR_SUFFIXES


@dataclass(frozen=True)
class Blip3o60k(Blip3o):
    """BLIP3o's set for instruction tuning, with its categories.

    `BLIP3o/BLIP3o-60k`: the members are those of `blip3o`; each category of prompts (JourneyDB, people of MSCOCO,
    DALL-E 3, objects in GenEval's style, common objects, simple text) has one or more tars.

    metadata: `category` is the name of the tar without a number at its end, `object_1.tar` -> `object`.
    """

    name: ClassVar[str] = "blip3o-60k"

    def items(self, path: Path) -> Iterator[Item | Damage]:
        category = category_of(path)
        for item in super().items(path):
            if isinstance(item, Item) and item.sample is not None:
                sample = replace(item.sample, metadata={**item.sample.metadata, "category": category})
                item = replace(item, sample=sample)
            yield item


def category_of(path: Path) -> str:
    stem = path.name.lower()
    for suffix in TAR_SUFFIXES:
        stem = stem.removesuffix(suffix)
    return re.sub(r"[-_.]\d+$", "", stem) or stem
