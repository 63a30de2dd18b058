from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import get_data_path
from PIL import Image

from rae_scale.data.looking import fonts as fonts_module
from rae_scale.data.looking.fonts import FontFile, Fonts
from rae_scale.data.looking.sheet import ALARM, MARGIN, Tile, clipped, draw_tile, write_sheets

FONTS = Path(get_data_path()) / "fonts/ttf"
RED = np.full((8, 8, 3), (200, 0, 0), np.uint8)


@pytest.fixture
def fonts(monkeypatch: pytest.MonkeyPatch) -> Fonts:
    """Without those of the machine: texts look the same everywhere."""
    monkeypatch.setattr(fonts_module, "system_fonts", lambda size: iter(()))
    return Fonts(12)


def shown(fonts: Fonts, text: str) -> str:
    return "".join(piece for _, piece in fonts.runs(text))


def test_what_no_font_has_is_spelled_out(fonts: Fonts) -> None:
    assert shown(fonts, "a 漢 Ж") == "a [6F22] Ж"
    assert fonts.missing == {"漢"}


def test_what_would_turn_or_break_a_label_is_spelled_out(fonts: Fonts) -> None:
    assert shown(fonts, "a\u202eb\0c\x1b") == "a[202E]b[0000]c[001B]"
    assert not fonts.missing


def test_other_fonts_are_asked_for_what_the_first_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def others(size: int):
        for name in ("DejaVuSansMono.ttf", "STIXSizOneSymReg.ttf", "cmex10.ttf"):
            opened.append(name)
            yield FontFile(FONTS / name, size)

    monkeypatch.setattr(fonts_module, "system_fonts", others)
    fonts = Fonts(12)
    assert shown(fonts, "plain") == "plain"
    assert not opened
    assert not fonts.missing
    symbol = "\u23b5"  # in STIX, in neither DejaVu
    assert shown(fonts, f"a{symbol}b") == f"a{symbol}b"
    assert opened == ["DejaVuSansMono.ttf", "STIXSizOneSymReg.ttf"]
    assert len(fonts.runs(f"a{symbol}b")) == 3


def test_a_font_of_the_user_comes_first(fonts: Fonts) -> None:
    chosen = Fonts(12, [FONTS / "DejaVuSerif.ttf"])
    assert chosen.runs("a")[0][0].getname()[0] == "DejaVu Serif"
    assert fonts.runs("a")[0][0].getname()[0] == "DejaVu Sans"


def test_a_file_that_is_no_font_is_named(tmp_path: Path) -> None:
    (tmp_path / "no.ttf").write_bytes(b"no font")
    for name in ("no.ttf", "nowhere.ttf"):
        with pytest.raises(ValueError, match=rf"{name}: not a scalable font"):
            Fonts(12, [tmp_path / name])


def test_lines_fit_and_lose_nothing(fonts: Fonts) -> None:
    text = "some words, " + "x" * 60 + " and\nmore\tof them"
    lines = fonts.wrap(text, 100)
    assert all(fonts.width(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert fonts.wrap("", 100) == []


def test_a_long_caption_says_how_much_is_not_shown(fonts: Fonts) -> None:
    text = "word " * 3000
    lines = clipped(text, fonts, 100, 4)
    assert len(lines) == 4
    left = int(lines[-1].split()[2].replace(",", ""))
    assert left + len(" ".join(lines[:-1])) == len(text.strip())
    assert clipped("short", fonts, 100, 4) == ["short"]


def test_a_picture_is_centred_and_keeps_its_proportions(fonts: Fonts) -> None:
    tile = np.asarray(draw_tile(Tile(np.repeat(RED, 2, axis=1), [], ""), fonts, side=64))[:64]
    red = (tile == (200, 0, 0)).all(axis=2)
    assert red[16:48].all()
    assert not red[:16].any()
    assert not red[48:].any()


def test_what_is_not_used_is_framed_in_red_and_says_why(fonts: Fonts) -> None:
    tile, plain = (draw_tile(Tile(None, ["one"], "", problem), fonts, side=64) for problem in ("no image", None))
    assert tile.getpixel((0, 0)) == ALARM
    assert plain.getpixel((0, 0)) != ALARM
    assert tile.height == plain.height + fonts.line_height


def test_pages_hold_all_tiles_in_order(fonts: Fonts, tmp_path: Path) -> None:
    shades = [np.full((4, 4, 3), 10 * number, np.uint8) for number in range(7)]
    tiles = (Tile(pixels, [], "") for pixels in shades)
    written = write_sheets(tiles, tmp_path / "new/sheet.png", fonts, side=16, columns=2, per_page=4)
    assert [path.name for path in written] == ["sheet.png", "sheet-2.png"]
    place, height = 16 + MARGIN, 18 + MARGIN
    found = []
    for path in written:
        with Image.open(path) as page:
            found += [page.getpixel((MARGIN + n % 2 * place + 8, MARGIN + n // 2 * height + 8)) for n in range(4)]
    assert found[:7] == [(10 * number,) * 3 for number in range(7)]
    assert found[7] == (255, 255, 255)
