"""Pictures side by side, each with its text below, large enough to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]

SHOWN_SIZE = 192  # smaller pictures are enlarged to about this many pixels
PADDING = 10
LINE_HEIGHT = 16
FONT_SIZE = 13
BACKGROUND, INK = (255, 255, 255), (30, 30, 30)


def labelled_grid(pictures: Sequence[Picture], labels: Sequence[str], columns: int | None = None) -> Image.Image:
    """Lay `pictures`, uint8 [S, S, 3] of one size, out row by row with their labels wrapped below.

    columns: pictures in a row; None makes the grid about square.

    Raises:
        ValueError: no pictures, as many labels as pictures are not given, or sizes differ.
    """
    check(pictures, labels)
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    height, width = (enlargement(pictures[0]) * side for side in pictures[0].shape[:2])
    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrap(label, font, width) for label in labels]
    cell_width = width + 2 * PADDING
    cell_height = height + 2 * PADDING + LINE_HEIGHT * max(len(lines) for lines in texts)

    canvas = Image.new("RGB", (columns * cell_width, rows * cell_height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for index, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        row, column = divmod(index, columns)
        left, top = column * cell_width + PADDING, row * cell_height + PADDING
        canvas.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS), (left, top))
        for number, line in enumerate(lines):
            draw.text((left, top + height + 4 + number * LINE_HEIGHT), line, INK, font)
    return canvas


def check(pictures: Sequence[Picture], labels: Sequence[str]) -> None:
    if not pictures or len(pictures) != len(labels):
        raise ValueError(f"a grid needs one label for each picture, got {len(pictures)} pictures, {len(labels)} labels")
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1:
        raise ValueError(f"the pictures of a grid have one size, got {', '.join(map(str, sorted(shapes)))}")


def enlargement(picture: Picture) -> int:
    """The whole factor that brings a small picture to about SHOWN_SIZE; large ones stay as they are."""
    return max(1, round(SHOWN_SIZE / max(picture.shape[:2])))


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break `text` into lines no wider than `width` pixels; a single word may be wider."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines
