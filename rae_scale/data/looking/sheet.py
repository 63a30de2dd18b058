"""Contact sheets: pictures in rows, each with its labels and its caption, on as many PNG pages as it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from rae_scale.data.looking.fonts import Fonts

PER_PAGE = 100
MARGIN = 6
PAPER, INK, FAINT, ALARM = (255, 255, 255), (20, 20, 20), (110, 110, 110), (190, 20, 20)


@dataclass(frozen=True)
class Tile:
    """One place of a sheet.

    pixels:  uint8 [H, W, 3] of any size, None for a sample without a picture.
    labels:  short lines that say which sample it is.
    text:    its caption or conversation.
    problem: why it is not used; the tile is then framed in red.
    """

    pixels: np.ndarray | None
    labels: Sequence[str]
    text: str
    problem: str | None = None


def write_sheets(
    tiles: Iterable[Tile],
    path: str | Path,
    fonts: Fonts,
    *,
    side: int = 192,
    columns: int = 8,
    caption_lines: int = 8,
    per_page: int = PER_PAGE,
) -> list[Path]:
    """Write `tiles` to the PNG file `path`; what does not fit on one page goes to `<stem>-2.png` and on.

    side: of a picture's place, in pixels. caption_lines: after which a text is cut, with a note of how much is left.
    The tiles of one page are in memory, not more.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for page in pages(tiles, per_page):
        name = path if not written else path.with_stem(f"{path.stem}-{len(written) + 1}")
        draw_page([draw_tile(tile, fonts, side, caption_lines) for tile in page], columns).save(name, "PNG")
        written.append(name)
    return written


def pages(tiles: Iterable[Tile], per_page: int) -> Iterator[list[Tile]]:
    tiles = iter(tiles)
    while page := list(islice(tiles, per_page)):
        yield page


def draw_page(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    columns, side = min(columns, len(tiles)), tiles[0].width
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    page = Image.new("RGB", (columns * (side + MARGIN) + MARGIN, sum(heights) + MARGIN * (len(rows) + 1)), PAPER)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for number, tile in enumerate(row):
            page.paste(tile, (MARGIN + number * (side + MARGIN), top))
        top += height + MARGIN
    return page


def draw_tile(tile: Tile, fonts: Fonts, side: int, caption_lines: int = 8) -> Image.Image:
    lines = [(line, FAINT) for label in tile.labels for line in fonts.wrap(label, side)]
    if tile.problem is not None:
        lines += [(line, ALARM) for line in clipped(tile.problem, fonts, side, caption_lines)]
    lines += [(line, INK) for line in clipped(tile.text, fonts, side, caption_lines)]
    image = Image.new("RGB", (side, side + 2 + len(lines) * fonts.line_height), PAPER)
    draw = ImageDraw.Draw(image)
    if tile.pixels is not None:
        image.paste(fitted(tile.pixels, side), centred(tile.pixels, side))
    else:
        draw.rectangle((0, 0, side - 1, side - 1), fill=(238, 238, 238))
    if tile.problem is not None:
        draw.rectangle((0, 0, side - 1, side - 1), outline=ALARM, width=3)
    for number, (line, colour) in enumerate(lines):
        left, top = 0.0, side + 2 + number * fonts.line_height
        for font, piece in fonts.runs(line):
            draw.text((left, top), piece, fill=colour, font=font)
            left += font.getlength(piece)
    return image


def clipped(text: str, fonts: Fonts, width: int, most: int) -> list[str]:
    # Wrapping costs a measurement per word: no need to do it for what is cut off.
    start = text[: most * width]
    lines = fonts.wrap(start, width)
    if len(lines) <= most and len(start) == len(text):
        return lines
    shown = lines[: most - 1]
    left = len(" ".join(text.split())) - len(" ".join(shown))
    return [*shown, f"... and {left:,} characters"]


def scaled_size(pixels: np.ndarray, side: int) -> tuple[int, int]:
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def fitted(pixels: np.ndarray, side: int) -> Image.Image:
    size = scaled_size(pixels, side)
    # Small pictures are enlarged pixel by pixel: what a model of 64 pixels sees is not smooth.
    enlarged = size[0] >= pixels.shape[1]
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.BICUBIC)


def centred(pixels: np.ndarray, side: int) -> tuple[int, int]:
    width, height = scaled_size(pixels, side)
    return (side - width) // 2, (side - height) // 2
