from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from rae_scale.data.decode import BadImage
from rae_scale.data.dedup.perceptual import perceptual_hash

MAX = 10**6


def picture(seed: int, side: int = 256) -> Image.Image:
    """Soft blobs with fine noise: what photos are to this hash."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
    noise = random.normal(0, 4, (side, side, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", **settings: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def distance(one: bytes, other: bytes) -> int:
    return (perceptual_hash(one, MAX) ^ perceptual_hash(other, MAX)).bit_count()


@pytest.mark.parametrize("seed", range(3))
def test_the_same_picture_in_another_size_quality_or_format_is_near(seed: int) -> None:
    image = picture(seed)
    original = encoded(image, quality=95)
    assert distance(original, encoded(image, quality=60)) <= 2
    assert distance(original, encoded(image, "PNG")) <= 2
    assert distance(original, encoded(image, "WEBP", quality=80)) <= 2
    assert distance(original, encoded(image.resize((64, 64), Image.LANCZOS), quality=95)) <= 2
    assert distance(original, encoded(image.resize((140, 140), Image.LANCZOS), quality=95)) <= 2
    assert distance(original, encoded(image.resize((300, 200), Image.LANCZOS), quality=95)) <= 2
    assert distance(original, encoded(image.crop((3, 3, 253, 253)))) <= 6


def test_other_pictures_are_far() -> None:
    hashes = [perceptual_hash(encoded(picture(seed, 64)), MAX) for seed in range(12)]
    distances = [(one ^ other).bit_count() for i, one in enumerate(hashes) for other in hashes[:i]]
    assert min(distances) > 10


def test_half_of_the_bits_are_set() -> None:
    assert perceptual_hash(encoded(picture(0)), MAX).bit_count() == 32


def test_the_hash_of_a_picture_never_changes() -> None:
    # Fingerprints on disk outlive the program that made them. Integer arithmetic makes it the same on every machine.
    rows, columns = np.mgrid[0:48, 0:40]
    pixels = np.stack([rows * columns % 251, rows * 5, 255 - columns * 6], axis=-1).astype(np.uint8)
    assert f"{perceptual_hash(encoded(Image.fromarray(pixels), 'PNG'), MAX):016x}" == GOLDEN


GOLDEN = "0f7c7061e7ccc899"


@pytest.mark.parametrize("value", [0, 77, 255])
def test_one_colour_has_the_hash_zero(value: int) -> None:
    for format in ("JPEG", "PNG"):
        assert perceptual_hash(encoded(Image.new("RGB", (50, 70), (value, 9, 80)), format), MAX) == 0


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (31, 33), (7, 300)])
def test_images_of_any_size_have_one(image: Callable[..., bytes], width: int, height: int) -> None:
    for format in ("JPEG", "PNG"):
        assert 0 <= perceptual_hash(image(format, width, height), MAX) < 2**64


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_have_one(mode: str) -> None:
    assert perceptual_hash(encoded(picture(0).convert(mode)), MAX) != 0


def test_what_cannot_be_decoded_is_refused(image: Callable[..., bytes]) -> None:
    for data in (b"", b"no image", image("PNG")[:-30], image("JPEG", 100, 100)[:-60]):
        with pytest.raises(BadImage, match="undecodable image"):
            perceptual_hash(data, MAX)
    with pytest.raises(BadImage, match="max_pixels"):
        perceptual_hash(image(width=50, height=50), 2499)
