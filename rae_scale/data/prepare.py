"""What a build does to a sample before it is written: refuse what cannot be used, turn, shrink, encode anew.

By default nothing is changed: the bytes of an image pass through. An image is encoded again only when its pixels change
or a format is asked for, because every lossy encoding costs quality.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from rae_scale.data.decode import (
    DEFAULT_MAX_PIXELS,
    FORMATS,
    PILLOW_ERRORS,
    BadImage,
    ImageHeader,
    decode_image,
    read_header,
)
from rae_scale.data.record import BadSample, Sample
from rae_scale.data.text import MAX_TEXT_LENGTH

ImageFormat = Literal["jpeg", "png", "webp"]
OWN_FORMAT: dict[str, ImageFormat] = {"PNG": "png", "WEBP": "webp"}  # all else that is read is some kind of JPEG
MAX_SIDE = {"jpeg": 65_500, "webp": 16_383}  # pixels that the formats can hold (JPEG: libjpeg)

# What has to be done to show the stored pixels upright (EXIF 2.3, tag 0x0112), as quarter turns to the left, then a
# mirror image.
UPRIGHT = {
    1: (0, False),
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (3, True),
    6: (3, False),
    7: (1, True),
    8: (1, False),
}


@dataclass(frozen=True)
class PrepareOptions:
    """What a build asks of its samples, and what it does to them.

    max_pixels:         images with more are refused before they are decoded.
    verify:             "decode" decodes every image once, "header" only reads its size (about ten times as fast).
    min_size:           shorter side in pixels, at least; smaller images are refused.
    max_aspect:         longer side over shorter side, at most; null has no limit.
    max_caption_length: characters of the longest caption; samples with a longer one are refused.
    exif_transpose:     turn the pixels as the EXIF orientation says. Readers ignore that tag, as the release does.
    resize:             shorter side in pixels to shrink larger images to (never enlarged); null keeps the size.
    reencode:           format to write every image in anew; null keeps the bytes of unchanged images, and the format of
                        changed ones.
    quality:            of JPEG and WebP written here, 1 to 100.
    """

    max_pixels: int = DEFAULT_MAX_PIXELS
    verify: Literal["decode", "header"] = "decode"
    min_size: int = 1
    max_aspect: float | None = None
    max_caption_length: int = MAX_TEXT_LENGTH
    exif_transpose: bool = False
    resize: int | None = None
    reencode: ImageFormat | None = None
    quality: int = 95

    def __post_init__(self) -> None:
        for name in ("max_pixels", "min_size", "resize"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give a number of pixels of at least 1")
        if self.verify not in ("decode", "header"):
            raise ValueError(f"verify={self.verify!r}: choose decode or header")
        if self.reencode not in (None, "jpeg", "png", "webp"):
            raise ValueError(f"reencode={self.reencode!r}: choose jpeg, png or webp, or leave it out to keep the bytes")
        if self.max_aspect is not None and not self.max_aspect >= 1:
            raise ValueError(f"max_aspect={self.max_aspect}: it is the longer side over the shorter, at least 1")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality}: choose 1 to 100")
        if not 1 <= self.max_caption_length <= MAX_TEXT_LENGTH:
            raise ValueError(f"max_caption_length={self.max_caption_length}: choose 1 to {MAX_TEXT_LENGTH}")
        if self.resize is not None and self.resize < self.min_size:
            raise ValueError(
                f"resize={self.resize} is below min_size={self.min_size}: images would become smaller than is asked for"
            )


def prepare_sample(sample: Sample, options: PrepareOptions) -> Sample:
    """The sample as it is to be written: the same object when nothing changes.

    Raises BadSample, whose reason is one of: text too long, image too small, image too large, extreme aspect,
    undecodable image.
    """
    longest = max((len(caption) for caption in sample.captions), default=0)
    if longest > options.max_caption_length:
        raise BadSample("text too long", f"a caption of {longest} characters (limit {options.max_caption_length})")
    if sample.image is None:
        return sample
    image = prepare_image(sample.image, options)
    return sample if image is sample.image else replace(sample, image=image)


def prepare_image(data: bytes, options: PrepareOptions) -> bytes:
    """The encoded image as it is to be written; `data` itself when nothing changes. Raises BadSample."""
    header = read_header(data, options.max_pixels)
    check_shape(header, options)
    orientation = read_orientation(data) if options.exif_transpose else 1
    shrinks = options.resize is not None and min(header.width, header.height) > options.resize
    changes = orientation != 1 or shrinks or options.reencode is not None
    if not changes:
        if options.verify == "decode":
            decode_image(data, options.max_pixels)
        return data
    if options.resize is not None and shrinks:
        # Twice as large leaves the low-pass to the resize; more pixels would only take longer.
        pixels = shrink(decode_image(data, options.max_pixels, at_least=2 * options.resize), header, options.resize)
    else:
        pixels = decode_image(data, options.max_pixels)
    turns, mirrored = UPRIGHT[orientation]
    pixels = np.rot90(pixels, turns)
    pixels = np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)
    return encode_image(pixels, options.reencode or OWN_FORMAT.get(header.format, "jpeg"), options.quality)


def check_shape(header: ImageHeader, options: PrepareOptions) -> None:
    shorter, longer = sorted((header.width, header.height))
    size = f"{header.width} x {header.height} pixels"
    if shorter < options.min_size:
        raise BadImage("image too small", f"{size}; the shorter side must have {options.min_size}")
    if options.max_aspect is not None and longer > options.max_aspect * shorter:
        raise BadImage("extreme aspect", f"{size}; the limit is {options.max_aspect:g} : 1")


def read_orientation(data: bytes) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 when none or no valid one is stated."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*PILLOW_ERRORS, Image.DecompressionBombError) as error:
        raise BadImage("undecodable image", f"its EXIF data: {error}") from None
    return value if value in UPRIGHT else 1


def shrink(pixels: np.ndarray, header: ImageHeader, size: int) -> np.ndarray:
    """The pixels of an image of `header`'s size, as uint8 `[H, W, 3]` with a shorter side of `size`.

    Antialiased, in the fixed point of Pillow: the same bytes on every machine.
    """
    scale = size / min(header.width, header.height)
    target = (round(header.width * scale), round(header.height * scale))
    return np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.LANCZOS))


def encode_image(pixels: np.ndarray, format: ImageFormat, quality: int) -> bytes:
    """Encode uint8 `[H, W, 3]`, without EXIF. JPEG keeps the full resolution of colour (4:4:4)."""
    side = max(pixels.shape[:2])
    if side > MAX_SIDE.get(format, side):
        raise BadImage("image too large", f"a side of {side} pixels; {format} holds {MAX_SIDE[format]}")
    if format == "jpeg":
        return simplejpeg.encode_jpeg(pixels, quality, "RGB", "444")
    buffer = io.BytesIO()
    settings = {"quality": quality} if format == "webp" else {}
    Image.fromarray(pixels).save(buffer, format, **settings)
    return buffer.getvalue()
