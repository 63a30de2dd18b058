"""BLIP3o's sets of images with one caption each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rae_scale.data.adapters.base import TarAdapter
from rae_scale.data.adapters.recaptioned import read_text
from rae_scale.data.layouts import make_sample, read_image, read_json
from rae_scale.data.record import BadSample, Sample
from rae_scale.data.tars import Group, TarReader


@dataclass(frozen=True)
class Blip3o(TarAdapter):
    """BLIP3o's sets for pretraining: tars of <key>.jpg and <key>.txt.

    `BLIP3o/BLIP3o-Pretrain-Long-Caption`, `-Short-Caption` and `-JourneyDB`, read by BLIP3-o's `dataset.py` in the same
    way. Keys start over in each tar.
    """

    name: ClassVar[str] = "blip3o"

    def sample(self, group: Group, tar: TarReader) -> Sample:
        caption = read_text(group, tar, "txt")
        if caption is None:
            raise BadSample("no caption", f"{group.key} has no txt")
        return make_sample(group.key, read_image(group, {}, tar), (caption,), read_json(group, tar))
