"""What the sets share whose images have a caption of their own and one by a model."""

from __future__ import annotations

from dataclasses import dataclass

from rae_scale.data.adapters.base import TarAdapter
from rae_scale.data.layouts import make_sample, read_image, read_json
from rae_scale.data.record import Sample
from rae_scale.data.tars import Group, TarReader
from rae_scale.data.text import check_caption, decode_text

# Betker et al., "Improving Image Generation with Better Captions" (2023, section 3): 95 % synthetic captions do best.
ORIGINAL_WEIGHT = 0.05


@dataclass(frozen=True)
class Recaptioned(TarAdapter):
    """A sample has captions by a model and maybe an original one, which is used with `original_weight`, 0 to 1."""

    original_weight: float = ORIGINAL_WEIGHT

    def __post_init__(self) -> None:
        if not 0 <= self.original_weight <= 1:
            raise ValueError(f"original_weight={self.original_weight}: it is a share of all uses; choose 0 to 1")

    def captioned(self, group: Group, tar: TarReader, synthetic: tuple[str, ...], original: str | None) -> Sample:
        """The sample with its captions, the synthetic ones first and equally often."""
        fields = read_json(group, tar)
        image = read_image(group, {}, tar)
        captions = synthetic if original is None else (*synthetic, original)
        if not synthetic or original is None:
            weights = (1.0,) * len(captions)
        else:
            weights = (*[(1 - self.original_weight) / len(synthetic)] * len(synthetic), self.original_weight)
        sample = make_sample(group.key, image, captions, fields)
        return Sample(sample.key, sample.image, captions, (), sample.metadata, weights)


def read_text(group: Group, tar: TarReader, suffix: str, *, blank_is_none: bool = False) -> str | None:
    """A caption in a text member; None when there is no such member. Raises BadSample."""
    member = group.members.get(suffix)
    if member is None:
        return None
    text = decode_text(tar.read(member), member.name)
    return None if blank_is_none and not text.strip() else check_caption(text, member.name)
