from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from rae_scale.data.transforms import resize_square, to_float


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


def test_to_float() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    pixels[0, 0] = (0, 51, 255)
    values = to_float(pixels)
    assert values.shape == (3, 2, 3)
    assert values.dtype == torch.float32
    assert values[:, 0, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert values[1, 1, 2].item() == pytest.approx(16 / 255)
