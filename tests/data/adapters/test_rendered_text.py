from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rae_scale.data.adapters.rendered_text import TEMPLATES, describe_style, make_captions, reading_order
from rae_scale.data.sources import Item, Source

Read = Callable[..., Item]


def box(left: float, top: float, width: float = 0.4, height: float = 0.08) -> list[list[float]]:
    return [[left, top], [left + width, top], [left + width, top + height], [left, top + height]]


@pytest.fixture
def read(tar: Callable[..., Path]) -> Read:
    """read(annotation, key="0", **options) -> the item of one picture"""

    def read(annotation: Any, key: str = "0", **options: str) -> Item:
        fields = json.dumps({"width": 1024, "height": 1024, "ocr_annotation": annotation}).encode()
        members = [(f"{key}.png", b"pixels"), (f"{key}.json", fields)]
        (item,) = Source(tar(members), "rendered-text", options)
        return item

    return read


def test_a_caption_holds_the_lines_and_how_they_look(read: Read) -> None:
    annotation = {
        "text": ["Dear Joe,", "see you"],
        "font": ["fonts/Caveat-Regular.ttf"] * 2,
        "font_color": [[250, 10, 20]] * 2,
        "text_rotation_angle": -7.4,
        "char": list("Dear"),
    }
    sample = read(annotation, captions="6").sample
    assert sample is not None and sample.image == b"pixels"
    style = ", in red, in the font Caveat Regular, tilted by 7 degrees"
    expected = {t.replace("{text}", '"Dear Joe,\nsee you"').replace("{style}", style) for t in TEMPLATES}
    assert set(sample.captions) == expected and len(expected) == 6
    assert sample.caption_weights == (1.0,) * 6
    assert sample.metadata == {"width": 1024, "height": 1024, "text": ["Dear Joe,", "see you"]}
    assert not any("Caveat" in caption for caption in read(annotation, style="false").sample.captions)


def test_the_wording_depends_on_the_key_alone(read: Read) -> None:
    assert read({"text": ["Hi"]}, key="7").sample.captions == make_captions("7", ["Hi"], "", 2)
    chosen = [make_captions(str(key), ["Hi"], "", 2) for key in range(40)]
    assert chosen == [make_captions(str(key), ["Hi"], "", 2) for key in range(40)]
    assert all(len(set(captions)) == 2 for captions in chosen)
    assert {captions[0] for captions in chosen} == {
        template.replace("{text}", '"Hi"').replace("{style}", "") for template in TEMPLATES
    }


def test_braces_in_the_text_are_text(read: Read) -> None:
    for caption in read({"text": ["{style} {text} {}"]}, captions="6").sample.captions:
        assert '"{style} {text} {}"' in caption


def test_lines_come_in_reading_order(read: Read) -> None:
    annotation = {"text": ["c", "b", "a"], "bb_relative": [box(0.1, 0.5), box(0.55, 0.11), box(0.1, 0.1)]}
    assert read(annotation).sample.metadata["text"] == ["a", "b", "c"]
    corners = {"text": ["b", "a"], "bounding_boxes": [box(100, 500, 50, 40), box(100, 100, 50, 40)]}
    assert read(corners).sample.metadata["text"] == ["a", "b"]


@pytest.mark.parametrize("boxes", [None, [], [box(0, 0)], [box(0, 0.5), "x"], [box(0, 0.5), [[1]]], "abc", [1, 2]])
def test_lines_without_usable_boxes_stay_as_they_are_listed(read: Read, boxes: Any) -> None:
    assert read({"text": ["a", "b"], "bb_relative": boxes}).sample.metadata["text"] == ["a", "b"]


def test_rows_that_rise_a_little_are_one_row() -> None:
    spans = [(0.14, 0.22, 0.0), (0.1, 0.18, 0.6), (0.12, 0.2, 0.3), (0.3, 0.38, 0.0)]
    assert reading_order(spans) == [0, 2, 1, 3]
    assert reading_order([]) == []
    assert reading_order([(0.0, 0.0, 0.0)] * 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("known", "style"),
    [
        ({}, ""),
        ({"font_color": [0.9, 0.05, 0.1]}, ", in red"),
        ({"font_color": [0, 0, 0]}, ", in black"),
        ({"font_color": [[0, 0, 0], [255, 255, 255]]}, ""),
        ({"text_color": "Dark Blue"}, ", in dark blue"),
        ({"font_color": [1, 2]}, ""),
        ({"font_color": ["<b>"]}, ""),
        ({"font_color": [-1, 0, 0]}, ""),
        ({"font": "a/Times_New-Roman.ttf"}, ", in the font Times New Roman"),
        ({"font": ["a.ttf", "b.ttf"]}, ""),
        ({"font": "x" * 100}, ""),
        ({"font": 3}, ""),
        ({"rotation": 2}, ""),
        ({"rotation": 1e9}, ""),
        ({"rotation": "a lot"}, ""),
        ({"text_rotation": [12, 12]}, ", tilted by 12 degrees"),
    ],
)
def test_only_what_is_known_is_said(known: dict[str, Any], style: str) -> None:
    assert describe_style(known) == style


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (None, "no caption"),
        ({}, "no caption"),
        ({"text": []}, "no caption"),
        ({"text": [3]}, "invalid text"),
        ({"text": ["a", " "]}, "empty text"),
        ({"text": ["<image>"]}, "invalid text"),
        ({"text": ["x" * 65_530]}, "text too long"),
    ],
)
def test_what_cannot_be_used_has_a_reason(read: Read, annotation: Any, reason: str) -> None:
    item = read(annotation)
    assert item.problem is not None and item.problem.reason == reason
