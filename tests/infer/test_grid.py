"""Labelled grids: where pictures go, how large they are shown, and that their text is there."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from rae_scale.infer.grid import FONT_SIZE, PADDING, labelled_grid, wrap


def solid(red: int, size: int = 64) -> np.ndarray:
    picture = np.zeros((size, size, 3), np.uint8)
    picture[..., 0] = red
    return picture


def test_pictures_are_laid_out_row_by_row() -> None:
    grid = labelled_grid([solid(red) for red in (50, 100, 150, 200)], ["a", "b", "c", "d"], columns=3)
    cell_width, cell_height = grid.width // 3, grid.height // 2
    centre = PADDING + 64 * 3 // 2

    def colour_at(row: int, column: int) -> object:
        return grid.getpixel((column * cell_width + centre, row * cell_height + centre))

    assert [colour_at(0, column) for column in range(3)] == [(50, 0, 0), (100, 0, 0), (150, 0, 0)]
    assert [colour_at(1, column) for column in range(3)] == [(200, 0, 0), (255, 255, 255), (255, 255, 255)]


@pytest.mark.parametrize(("size", "shown"), [(64, 192), (16, 192), (224, 224), (500, 500)])
def test_small_pictures_are_enlarged(size: int, shown: int) -> None:
    assert labelled_grid([solid(9, size)], ["x"]).width == shown + 2 * PADDING


def test_each_picture_has_its_text_below() -> None:
    def ink(label: str) -> int:
        return int((np.asarray(labelled_grid([solid(0)], [label]))[PADDING + 192 :] < 128).sum())

    assert ink("a red circle") > ink("a") > 0


def test_long_text_wraps_and_loses_no_word() -> None:
    text = "a photo of a red circle left of a blue square and so on"
    font = ImageFont.load_default(FONT_SIZE)
    lines = wrap(text, font, 150)
    assert len(lines) > 1
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 150 for line in lines)


@pytest.mark.parametrize(
    ("pictures", "labels", "message"),
    [
        ([], [], "0 pictures"),
        ([solid(1)], [], "1 pictures, 0 labels"),
        ([solid(1), solid(1, 32)], ["a", "b"], "have one size"),
    ],
)
def test_what_is_no_grid_is_refused(pictures: list[np.ndarray], labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labelled_grid(pictures, labels)
