"""Checks on the text of samples: what is not usable as training text is refused with a reason."""

from __future__ import annotations

import json
from typing import Any

from rae_scale.data.record import IMAGE_PLACEHOLDER, BadSample, Role, Turn

# Far above any sequence length (512 to 1024 tokens); a longer "caption" is a file in the wrong place.
MAX_TEXT_LENGTH = 65_536
ROLES: tuple[Role, Role] = ("human", "gpt")


def decode_text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")  # drops a byte order mark, which would become part of the caption
    except UnicodeDecodeError as error:
        raise BadSample("invalid text", f"{name} is not UTF-8 (byte {error.start})") from None


def check_text(text: object, name: str) -> str:
    """`text` without surrounding whitespace. Raises BadSample when it is empty, not text, or far too long."""
    if not isinstance(text, str):
        raise BadSample("invalid text", f"{name} is {type(text).__name__}, not text")
    if "\0" in text:
        raise BadSample("invalid text", f"{name} holds a NUL character")
    try:
        text.encode("utf-8")  # JSON escapes can spell half of a surrogate pair
    except UnicodeEncodeError as error:
        raise BadSample("invalid text", f"{name} cannot be written as UTF-8 (character {error.start})") from None
    if len(text) > MAX_TEXT_LENGTH:
        raise BadSample("text too long", f"{name} has {len(text)} characters (limit {MAX_TEXT_LENGTH})")
    text = text.strip()
    if not text:
        raise BadSample("empty text", f"{name} is empty")
    return text


def check_caption(text: object, name: str) -> str:
    caption = check_text(text, name)
    if IMAGE_PLACEHOLDER in caption:
        raise BadSample("invalid text", f"{name} holds {IMAGE_PLACEHOLDER!r}, which stands for an image")
    return caption


def parse_json_object(data: bytes, name: str) -> dict[str, Any]:
    text = decode_text(data, name)
    try:
        value = json.loads(text)
    except RecursionError:
        raise BadSample("bad json", f"{name} is nested too deeply") from None
    except ValueError as error:
        raise BadSample("bad json", f"{name}: {error}") from None
    if not isinstance(value, dict):
        raise BadSample("bad json", f"{name} holds {type(value).__name__}, not an object")
    return value


def parse_turns(conversations: object, name: str) -> tuple[Turn, ...]:
    """Turns of the official form `[{"from": "human" | "gpt", "value": text}, ...]`, human first and alternating."""
    if not isinstance(conversations, list) or len(conversations) < 2:
        raise BadSample("bad conversation", f"{name}: conversations need a list of at least two turns")
    turns = []
    for position, item in enumerate(conversations):
        role = item.get("from") if isinstance(item, dict) else None
        expected = ROLES[position % 2]
        if role != expected:
            raise BadSample("bad conversation", f"{name}: turn {position} is from {role!r}, expected {expected!r}")
        turns.append(Turn(expected, check_text(item.get("value"), f"{name}: turn {position}")))
    return tuple(turns)


def check_placeholders(turns: tuple[Turn, ...], has_image: bool, name: str) -> None:
    """At most one `<image>`, and none without an image. (An image that no turn mentions goes in front of the first.)"""
    count = sum(turn.value.count(IMAGE_PLACEHOLDER) for turn in turns)
    if count > 1:
        raise BadSample("several images", f"{name} mentions {IMAGE_PLACEHOLDER} {count} times; one image is supported")
    if count and not has_image:
        raise BadSample("no image", f"{name} mentions {IMAGE_PLACEHOLDER} but comes without an image")
