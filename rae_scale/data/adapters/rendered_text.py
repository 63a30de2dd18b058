"""Captions for pictures of text, made from what is known about how they were rendered."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, ClassVar

import xxhash

from rae_scale.data.adapters.base import TarAdapter
from rae_scale.data.layouts import make_sample, read_image, read_json
from rae_scale.data.record import BadSample, Sample
from rae_scale.data.tars import Group, TarReader
from rae_scale.data.text import check_caption, check_text

# {text} is in quotes; {style} is empty or ends in a blank: `black, slanted, in the font Caveat `.
TEMPLATES = (
    "An image of the text {text}{style}",
    "A page that reads {text}{style}",
    "A sheet of paper with the words {text}{style}",
    "{text} written on paper{style}",
    "A photo of a written note{style}. It says: {text}",
    "Rendered text{style}. The lines are: {text}",
)
COLORS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 220, 40),
    "green": (30, 150, 50),
    "cyan": (40, 200, 220),
    "blue": (40, 70, 210),
    "purple": (130, 50, 180),
    "pink": (250, 130, 190),
    "brown": (120, 70, 30),
}
# How the JSON may call these, in the annotation of the text or beside it.
FONT_KEYS = ("font", "font_name", "fonts")
COLOR_KEYS = ("font_color", "text_color", "color")
ROTATION_KEYS = ("text_rotation_angle", "text_rotation", "rotation")
BOX_KEYS = ("bb_relative", "bounding_boxes")
UPRIGHT_DEGREES = 2  # a rotation up to this is not worth a word


@dataclass(frozen=True)
class RenderedText(TarAdapter):
    """Pictures of text, with captions made from what was rendered.

    `wendlerc/RenderedText`: tars of <key>.png and <key>.json, handwritten text on paper rendered by Blender:

        {"width": 1024, "height": 1024, "ocr_annotation": {"text": [line, ...], "bb_relative": [[[x, y] * 4], ...],
         "font": ..., "font_color": ..., "text_rotation_angle": ..., boxes of characters ...}}

    It has no captions. Here they are made of the lines, in reading order (rows from the top, then from the left, where
    the boxes of the lines are given) and of font, colour and rotation where they are given and the same for all lines.

    captions: how many of the wordings each sample gets, chosen by its key, all with equal weight.
    style:    whether captions mention font, colour and rotation.

    metadata keeps the lines as `text`; the boxes, larger than all else, are left out.
    """

    name: ClassVar[str] = "rendered-text"
    captions: int = 2
    style: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.captions <= len(TEMPLATES):
            raise ValueError(f"captions={self.captions}: choose 1 to {len(TEMPLATES)}")

    def sample(self, group: Group, tar: TarReader) -> Sample:
        fields = read_json(group, tar)
        annotation = fields.get("ocr_annotation")
        if not isinstance(annotation, dict):
            raise BadSample("no caption", f"{group.key} has no ocr_annotation")
        lines = ordered_lines(annotation, group.key)
        known = {**fields, **annotation}
        style = describe_style(known) if self.style else ""
        captions = make_captions(group.key, lines, style, self.captions)
        sample = make_sample(group.key, read_image(group, {}, tar), captions, fields)
        metadata = {**sample.metadata, "text": lines}
        return replace(sample, metadata=metadata, caption_weights=(1.0,) * len(captions))


def make_captions(key: str, lines: list[str], style: str, count: int) -> tuple[str, ...]:
    """`count` different wordings, chosen by the hash of the key."""
    text = '"' + "\n".join(lines) + '"'
    first = xxhash.xxh3_64_intdigest(key.encode()) % len(TEMPLATES)
    templates = [TEMPLATES[(first + number) % len(TEMPLATES)] for number in range(count)]
    return tuple(
        check_caption(template.replace("{style}", style).replace("{text}", text), f"{key}: its text")
        for template in templates
    )


def ordered_lines(annotation: dict[str, Any], key: str) -> list[str]:
    """The lines in reading order; as they are listed when their boxes are not given. Raises BadSample."""
    value = annotation.get("text")
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not listed:
        raise BadSample("no caption", f"{key}: ocr_annotation.text has no lines")
    lines = [check_text(line, f"{key}: a line") for line in listed]
    spans = [span_of(box) for box in next((annotation[name] for name in BOX_KEYS if is_list(annotation, name)), [])]
    if len(spans) != len(lines) or None in spans:
        return lines
    return [lines[index] for index in reading_order([span for span in spans if span is not None])]


def is_list(fields: dict[str, Any], name: str) -> bool:
    return isinstance(fields.get(name), list)


def span_of(box: object) -> tuple[float, float, float] | None:
    """(top, bottom, left) of a box given by its corners `[[x, y], ...]`; None for what is no such box."""
    try:
        xs, ys = zip(*((float(x), float(y)) for x, y in box), strict=True)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return None
    return (min(ys), max(ys), min(xs))


def reading_order(spans: list[tuple[float, float, float]]) -> list[int]:
    """Indexes of the boxes, row by row from the top. A box is in the row of the first one whose middle it covers."""
    left = sorted(range(len(spans)), key=lambda index: spans[index])
    order = []
    while left:
        top, bottom, _ = spans[left[0]]
        middle = (top + bottom) / 2
        row = [index for index in left if spans[index][0] <= middle <= spans[index][1]] or left[:1]
        order += sorted(row, key=lambda index: spans[index][2])
        left = [index for index in left if index not in row]
    return order


def describe_style(known: dict[str, Any]) -> str:
    """What is known of colour, font and rotation, as `, in black, in the font Caveat`; "" when nothing is."""
    parts = []
    color = color_name(only_value(known, COLOR_KEYS, of_numbers=True))
    if color:
        parts.append(f"in {color}")
    font = font_name(only_value(known, FONT_KEYS))
    if font:
        parts.append(f"in the font {font}")
    rotation = only_value(known, ROTATION_KEYS)
    if isinstance(rotation, int | float) and UPRIGHT_DEGREES < abs(rotation) <= 360:
        parts.append(f"tilted by {abs(round(rotation))} degrees")
    return "".join(f", {part}" for part in parts)


def only_value(known: dict[str, Any], names: tuple[str, ...], *, of_numbers: bool = False) -> Any:
    """The value under the first of `names` that is there: one for all lines, or a list in which all are the same."""
    value = next((known[name] for name in names if known.get(name) is not None), None)
    if not isinstance(value, list) or (of_numbers and value and not isinstance(value[0], list | str)):
        return value
    return value[0] if value and all(item == value[0] for item in value) else None


def color_name(value: object) -> str | None:
    """The nearest of `COLORS` to red, green, blue (0 to 255, or 0 to 1), or a name as it is."""
    if isinstance(value, str) and re.fullmatch("[a-zA-Z ]{3,30}", value):
        return value.lower()
    if not isinstance(value, list) or len(value) not in (3, 4):
        return None
    if not all(isinstance(part, int | float) and 0 <= part <= 255 for part in value):
        return None
    rgb = [part * 255 for part in value[:3]] if max(value) <= 1 else value[:3]
    return min(COLORS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLORS[name], rgb, strict=True)))


def font_name(value: object) -> str | None:
    """`fonts/Caveat-Regular.ttf` -> `Caveat Regular`."""
    if not isinstance(value, str):
        return None
    words = re.sub(r"[^\w]+|_", " ", PurePath(value).stem).strip()
    return words if 0 < len(words) <= 60 else None
