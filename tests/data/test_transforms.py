from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rae_scale.config.schema import Crop
from rae_scale.data.draws import Draw, uniform
from rae_scale.data.transforms import ImageTransform, resize_square, to_float


@pytest.mark.parametrize(("width", "height", "size"), [(300, 200, 64), (64, 480, 224), (30, 50, 64), (1, 1, 16)])
def test_resize_equals_pillows_antialiased_bicubic_within_one_level(width: int, height: int, size: int) -> None:
    # Away from 0 and 255, where the two clip overshoots at different moments.
    pixels = np.random.default_rng(0).integers(80, 176, (height, width, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    resized = resize_square(pixels, size)
    assert resized.dtype == np.uint8
    assert resized.flags.c_contiguous
    assert np.abs(resized.astype(int) - expected).max() <= 1


def test_an_image_of_the_right_size_passes_untouched() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    assert resize_square(pixels, 64) is pixels


@pytest.mark.parametrize("size", [(64, 64), (50, 90)])
def test_the_result_is_written_where_it_is_wanted(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
    block = np.zeros((3, 64, 64, 3), np.uint8)
    resized = resize_square(image, 64, block[1])
    assert np.shares_memory(resized, block[1])
    assert np.array_equal(block[1], resize_square(image, 64))
    assert not block[0].any() and not block[2].any()


def test_to_float() -> None:
    pixels = torch.arange(2 * 3 * 3, dtype=torch.uint8).reshape(1, 2, 3, 3)
    pixels[0, 0, 0] = torch.tensor([0, 51, 255])
    values = to_float(pixels)
    assert values.shape == (1, 3, 2, 3)
    assert values.dtype == torch.float32
    assert values[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert values[0, 1, 1, 2].item() == pytest.approx(16 / 255)


def test_to_float_divides_as_a_cpu_does() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(levels.view(1, 16, 16, 1)).flatten(), levels.float() / 255.0)


STRIPES = np.repeat(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], 10, axis=0).repeat(3, axis=2)  # 10 x 30 pixels


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("upright", [False, True])
def test_center_crop_keeps_the_middle_and_square_keeps_all(upright: bool) -> None:
    image = STRIPES.transpose(1, 0, 2) if upright else STRIPES
    center = ImageTransform(10, 1000, crop="center")(png(image), 0)
    assert np.array_equal(center, image[10:20] if upright else image[:, 10:20])
    assert np.array_equal(ImageTransform(10, 1000)(png(image), 0), resize_square(image, 10))


def test_random_crops_reach_both_ends_and_are_functions_of_seed_and_index() -> None:
    def lefts(seed: int) -> list[int]:
        crop = ImageTransform(10, 1000, crop="random", seed=seed)
        return [int(crop(png(STRIPES), index)[0, 0, 0]) // 8 for index in range(200)]

    found = lefts(seed=3)
    assert found == lefts(seed=3) != lefts(seed=4)
    assert set(found) == set(range(21))


def test_half_of_the_pictures_are_mirrored_independently_of_the_crop() -> None:
    flip = ImageTransform(10, 1000, crop="random", flip=True, seed=1)
    steps = [np.diff(flip(png(STRIPES), index)[0, :, 0].astype(int)) for index in range(200)]
    mirrored = [bool((step < 0).all()) for step in steps]
    assert all((step > 0).all() for step, left in zip(steps, mirrored, strict=True) if not left)
    assert 70 < sum(mirrored) < 130
    at_left_end = [uniform(1, index, Draw.CROP) < 0.5 for index in range(200)]
    assert 60 < sum(a == b for a, b in zip(mirrored, at_left_end, strict=True)) < 140


@pytest.mark.parametrize("crop", ["square", "center", "random"])
def test_a_scaled_decode_is_close_to_the_full_one(image, crop: Crop) -> None:
    data = image("JPEG", width=300, height=200)
    full, scaled = (ImageTransform(64, 60_000, crop, scaled_decode=way, seed=5)(data, 7) for way in (False, True))
    assert psnr(full, scaled) > 38


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(image.astype(float) - other).mean()))
