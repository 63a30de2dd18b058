"""What makes two samples duplicates: the same content, or images that look the same."""

from __future__ import annotations

import struct

import xxhash

from rae_scale.data.dedup.perceptual import perceptual_hash
from rae_scale.data.dedup.records import RECORD
from rae_scale.data.record import IMAGE_PLACEHOLDER, Sample

PACKED = struct.Struct("<16sQII")
assert PACKED.size == RECORD.itemsize


def fingerprint(sample: Sample, position: int, *, perceptual: bool, max_pixels: int) -> bytes:
    """The record of a sample that is the `position`-th item of its input file.

    content: xxh3_128 of the image bytes, whatever its captions are. A conversation about an image (the user shows it,
             the answer is text) is hashed with its turns, because many questions are asked about one image; one without
             an image by its turns alone.
    look:    with `perceptual`, the perceptual hash of an image that is to be generated. Conversations about images have
             none: two questions about two similar images are no duplicates.

    Raises BadImage for an image that cannot be decoded; only with `perceptual`, which decodes it.
    """
    digest = xxhash.xxh3_128(sample.image or b"")
    about = sample.image is None or shows_image_to_model(sample)
    if about:
        for turn in sample.turns:
            digest.update(f"\0{turn.role}\0{turn.value}".encode())
    has_look = perceptual and not about and sample.image is not None
    look = perceptual_hash(sample.image, max_pixels) if has_look and sample.image else 0
    return PACKED.pack(digest.digest(), look, position, has_look)


def shows_image_to_model(sample: Sample) -> bool:
    """Whether the image is part of a question, not the answer. An image that no turn mentions belongs to the first."""
    return bool(sample.turns) and not any(
        turn.role == "gpt" and IMAGE_PLACEHOLDER in turn.value for turn in sample.turns
    )
