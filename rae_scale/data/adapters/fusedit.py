"""The sets as FuseDiT's scripts prepare them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rae_scale.data.adapters.recaptioned import Recaptioned, read_text
from rae_scale.data.record import BadSample, Sample
from rae_scale.data.tars import Group, TarReader


@dataclass(frozen=True)
class FuseDiT(Recaptioned):
    """CC12M, SA-1B and JourneyDB as FuseDiT prepares them, with synthetic captions.

    The tars that its scripts make (`utils/process_cc12m.py`, `process_sa1b.py`, `process_journeydb.py`):

        cc12m-train-0000.tar   <key>.image.jpg, <key>.original_caption.txt, <key>.synthetic_caption.txt
        SA-1B, JourneyDB       <key>.image.jpg, <key>.synthetic_caption.txt

    or the same members in a folder per key. CC12M's original caption is the image's alt text; where it is blank, only
    the synthetic one is kept.

    original_weight: how often the original caption is used, 0 to 1; the synthetic one has the rest.
    """

    name: ClassVar[str] = "fusedit"

    def sample(self, group: Group, tar: TarReader) -> Sample:
        synthetic = read_text(group, tar, "synthetic_caption.txt")
        if synthetic is None:
            raise BadSample("no caption", f"{group.key} has no synthetic_caption.txt")
        return self.captioned(
            group, tar, (synthetic,), read_text(group, tar, "original_caption.txt", blank_is_none=True)
        )
