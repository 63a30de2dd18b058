"""The official release's own layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rae_scale.data.adapters.base import TarAdapter
from rae_scale.data.layouts import claimed_images, make_sample, read_image, read_json
from rae_scale.data.record import BadSample, Sample
from rae_scale.data.tars import Group, TarReader


@dataclass(frozen=True)
class ScaleRAE(TarAdapter):
    """The official release's own layout, and its set of images by FLUX.1-schnell.

    `nyu-visionx/scale-rae-data` (24.7M images), and whatever is prepared as the release's `docs/Train.md` says:

        wds_flux.json     {"dataset_name": "...", "tars": ["00000.tar", ...]}, see `rae_scale.data.manifests`
        00000.tar         sample_0.json {"conversations": [...], "metadata": {...}, "image_filename": "0.jpg"}, 0.jpg

    Samples are the JSON members. An image that no JSON names is reported.
    """

    name: ClassVar[str] = "scale-rae"

    def sample(self, group: Group, tar: TarReader) -> Sample:
        fields = read_json(group, tar)
        if "conversations" not in fields:
            raise BadSample("bad conversation", f"{group.key} has no json with conversations")
        return make_sample(group.key, read_image(group, fields, tar), (), fields)

    def attached(self, tar: TarReader) -> set[str]:
        return claimed_images(tar)
