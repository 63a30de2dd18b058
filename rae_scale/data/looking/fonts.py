"""Text of any script on a picture: a font is found for each character, and what no font has is spelled out.

A box in place of a character would hide what a caption says, and a wrong glyph would lie about it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from PIL import ImageFont


class HasGlyphs(Protocol):
    """A font file and the code points that it has glyphs for."""

    font: ImageFont.FreeTypeFont
    code_points: frozenset[int]


class FontFile:
    """Raises ValueError when `path` is no font that can be drawn at any size, as bitmap fonts cannot."""

    def __init__(self, path: str | Path, size: int) -> None:
        from matplotlib.ft2font import FT2Font

        try:
            self.code_points = frozenset(FT2Font(str(path)).get_charmap())
            self.font = ImageFont.truetype(str(path), size)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: not a scalable font ({error}); give a .ttf, .otf or .ttc file") from None


class Fonts:
    """Splits text into runs of one font each, and measures and wraps it.

    Fonts are tried in this order: those in `paths`, DejaVu Sans (it comes with matplotlib), all that the system has.
    The system's are opened only when a character is in none of the others.

    Right-to-left text is ordered within a run, by Pillow's raqm; runs themselves follow each other from the left.
    Raises ValueError when a file in `paths` is no font.
    """

    def __init__(self, size: int, paths: Sequence[str | Path] = ()) -> None:
        from matplotlib import get_data_path

        own = Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
        self.size = size
        self.missing: set[str] = set()
        """Characters that were spelled out because no font has them."""
        self._files: list[HasGlyphs] = [FontFile(path, size) for path in [*paths, own]]
        self._others: Iterator[HasGlyphs] = system_fonts(size)
        self._chosen: dict[str, int | None] = {}
        self.line_height = size + size // 3

    def runs(self, text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
        """`text`, which holds no line breaks, in pieces that have one font each, unprintable characters spelled out."""
        runs: list[tuple[int, str]] = []
        for character in text:
            number = self._font_of(character)
            piece = character if number is not None else spelled(character)
            if runs and runs[-1][0] == (number or 0):
                piece = runs.pop()[1] + piece
            runs.append((number or 0, piece))
        return [(self._files[number].font, piece) for number, piece in runs]

    def width(self, text: str) -> float:
        return sum(font.getlength(piece) for font, piece in self.runs(text))

    def wrap(self, text: str, width: float) -> list[str]:
        """`text` in lines of at most `width` pixels, broken at spaces, or within a word that is longer than a line."""
        lines: list[str] = []
        line = ""
        for word in text.split():
            joined = f"{line} {word}" if line else word
            if self.width(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            *full, line = self._break(word, width)
            lines += full
        return [*lines, line] if line else lines

    def _break(self, word: str, width: float) -> list[str]:
        pieces = [""]
        for character in word:
            if pieces[-1] and self.width(pieces[-1] + character) > width:
                pieces.append("")
            pieces[-1] += character
        return pieces

    def _font_of(self, character: str) -> int | None:
        if character not in self._chosen:
            self._chosen[character] = None if is_control(character) else self._find(ord(character))
            if self._chosen[character] is None and not is_control(character):
                self.missing.add(character)
        return self._chosen[character]

    def _find(self, code_point: int) -> int | None:
        for number, file in enumerate(self._files):
            if code_point in file.code_points:
                return number
        for file in self._others:
            self._files.append(file)
            if code_point in file.code_points:
                return len(self._files) - 1
        return None


def system_fonts(size: int) -> Iterator[HasGlyphs]:
    from matplotlib.font_manager import findSystemFonts

    for path in sorted(findSystemFonts()):
        try:
            yield FontFile(path, size)
        except ValueError:
            continue  # bitmap fonts, such as those of colour emoji


def is_control(character: str) -> bool:
    """Control characters, and those that turn the direction of text: a label must not be reordered by what it shows."""
    return unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in DIRECTIONS


DIRECTIONS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def spelled(character: str) -> str:
    return f"[{ord(character):04X}]"
