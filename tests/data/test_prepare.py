from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from rae_scale.data.decode import decode_image
from rae_scale.data.prepare import PrepareOptions, prepare_sample
from rae_scale.data.record import BadSample, Sample, Turn
from rae_scale.data.text import MAX_TEXT_LENGTH

MAX = 10**6


def sample_of(image: bytes | None) -> Sample:
    return Sample("0", image, ("a red circle",), (), {"a": 1}, (1.0,))


def turned(orientation: int, format: str = "PNG", width: int = 24, height: int = 16) -> bytes:
    """A picture whose EXIF says how to turn it."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, exif=exif)
    return buffer.getvalue()


def shape(data: bytes) -> tuple[str | None, tuple[int, int]]:
    with Image.open(io.BytesIO(data)) as image:
        return image.format, image.size


def refused(sample: Sample, **options: object) -> str:
    with pytest.raises(BadSample) as error:
        prepare_sample(sample, PrepareOptions(**options))  # type: ignore[arg-type]
    return error.value.reason


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("verify", ["decode", "header"])
def test_bytes_pass_through_unless_something_is_asked_for(image: Callable[..., bytes], format: str, verify) -> None:
    sample = sample_of(image(format))
    assert prepare_sample(sample, PrepareOptions(verify=verify)) is sample
    asked = PrepareOptions(verify=verify, min_size=16, max_aspect=1.5, resize=16, exif_transpose=True)
    assert prepare_sample(sample, asked) is sample, "24 x 16 upright needs none of these"


def test_samples_without_an_image_pass() -> None:
    sample = Sample("0", None, (), (Turn("human", "Hello"), Turn("gpt", "Hi")))
    assert prepare_sample(sample, PrepareOptions(min_size=100, resize=100, reencode="jpeg")) is sample


def test_what_is_refused_has_a_reason(image: Callable[..., bytes]) -> None:
    sample = sample_of(image(width=24, height=16))
    assert refused(sample, min_size=17) == "image too small"
    assert refused(sample, max_aspect=1.49) == "extreme aspect"
    assert refused(sample, max_pixels=24 * 16 - 1) == "image too large"
    assert refused(sample, max_caption_length=11) == "text too long"
    assert refused(sample_of(image(width=16, height=24)), max_aspect=1.49) == "extreme aspect"
    assert refused(sample_of(b"no image")) == "undecodable image"
    assert refused(sample_of(b"")) == "undecodable image", "an empty file is no missing one"


@pytest.mark.parametrize("changes", [{"verify": "decode"}, {"verify": "header", "resize": 8}])
def test_a_cut_off_image_is_refused_wherever_it_is_decoded(image: Callable[..., bytes], changes: dict) -> None:
    cut = sample_of(image()[:-40])
    assert refused(cut, **changes) == "undecodable image"
    assert prepare_sample(cut, PrepareOptions(verify="header")) is cut


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_carried_out_as_pillow_does(orientation: int) -> None:
    data = turned(orientation)
    upright = prepare_sample(sample_of(data), PrepareOptions(exif_transpose=True)).image
    assert upright is not None
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decode_image(upright, MAX), expected)
    again = prepare_sample(sample_of(upright), PrepareOptions(exif_transpose=True)).image
    assert again is upright, "a turned image must not say that it is to be turned once more"
    assert prepare_sample(sample_of(data), PrepareOptions()).image is data


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_upright(orientation: int) -> None:
    data = turned(orientation)
    assert prepare_sample(sample_of(data), PrepareOptions(exif_transpose=True)).image is data


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_larger_images_are_shrunk_to_the_shorter_side_in_their_format(image: Callable[..., bytes], format: str) -> None:
    sample = sample_of(image(format, width=90, height=60))
    small = prepare_sample(sample, PrepareOptions(resize=20))
    assert small.image is not None
    assert shape(small.image) == (format, (30, 20))
    assert replace(small, image=sample.image) == sample, "nothing else changes"
    assert sample.image is not None
    reference = Image.fromarray(decode_image(sample.image, MAX)).resize((30, 20), Image.Resampling.LANCZOS)
    distance = np.abs(decode_image(small.image, MAX).astype(int) - np.asarray(reference))
    assert distance.mean() < 2, "shrunk from the decoded pixels, encoded once"


def test_a_jpeg_that_is_decoded_small_keeps_its_shape_and_look(image: Callable[..., bytes]) -> None:
    data = image("JPEG", width=1001, height=333)
    small = prepare_sample(sample_of(data), PrepareOptions(resize=40)).image
    assert small is not None and shape(small) == ("JPEG", (120, 40))
    reference = Image.fromarray(decode_image(data, MAX)).resize((120, 40), Image.Resampling.LANCZOS)
    assert np.abs(decode_image(small, MAX).astype(int) - np.asarray(reference)).mean() < 2


def test_shrinking_and_turning_together() -> None:
    data = turned(6, "JPEG", width=90, height=60)
    upright = prepare_sample(sample_of(data), PrepareOptions(exif_transpose=True, resize=20)).image
    assert upright is not None and shape(upright) == ("JPEG", (20, 30))


def test_a_very_long_image_keeps_the_asked_side(image: Callable[..., bytes]) -> None:
    data = prepare_sample(sample_of(image(width=400, height=3)), PrepareOptions(resize=2)).image
    assert data is not None and shape(data)[1] == (267, 2)


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_reencode_writes_every_image_in_one_format(image: Callable[..., bytes], format) -> None:
    options = PrepareOptions(reencode=format)
    for given in ("JPEG", "PNG", "WEBP"):
        data = prepare_sample(sample_of(image(given)), options).image
        assert data is not None and shape(data) == (format.upper(), (24, 16))


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_quality_counts(image: Callable[..., bytes], format) -> None:
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(noise, "PNG")
    sizes = [
        len(prepare_sample(sample_of(noise.getvalue()), PrepareOptions(reencode=format, quality=quality)).image or b"")
        for quality in (30, 60, 95)
    ]
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize(("format", "side"), [("webp", 16_383), ("jpeg", 65_500)])
def test_what_a_format_cannot_hold_is_refused(image: Callable[..., bytes], format: str, side: int) -> None:
    for width, height in ((side + 1, 1), (1, side + 1)):
        assert refused(sample_of(image("PNG", width, height)), reencode=format) == "image too large"
    assert prepare_sample(sample_of(image("PNG", side, 1)), PrepareOptions(reencode=format)).image  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"verify": "no"}, "choose decode or header"),
        ({"reencode": "bmp"}, "choose jpeg, png or webp"),
        ({"quality": 0}, "choose 1 to 100"),
        ({"min_size": 0}, "at least 1"),
        ({"max_pixels": 0}, "at least 1"),
        ({"resize": -1}, "at least 1"),
        ({"max_aspect": 0.5}, "at least 1"),
        ({"max_aspect": float("nan")}, "at least 1"),
        ({"max_caption_length": MAX_TEXT_LENGTH + 1}, "choose 1 to"),
        ({"min_size": 256, "resize": 200}, "below min_size"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PrepareOptions(**options)
