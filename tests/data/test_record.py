from __future__ import annotations

import pytest

from rae_scale.data.record import Sample, Turn

TEMPLATE = "Generate an image of {caption}"


def test_a_caption_becomes_a_request_answered_by_the_image() -> None:
    sample = Sample("k", b"x", ("a red circle", "another caption"))
    assert sample.conversation(TEMPLATE) == (
        Turn("human", "Generate an image of a red circle"),
        Turn("gpt", "Here you go:\n<image>"),
    )


def test_turns_of_its_own_come_before_the_caption() -> None:
    turns = (Turn("human", "<image>\nWhat is it?"), Turn("gpt", "A circle."))
    assert Sample("k", b"x", ("a red circle",), turns).conversation(TEMPLATE) == turns


def test_braces_in_captions_and_templates_are_text() -> None:
    sample = Sample("k", b"x", ("a {0}",))
    assert sample.conversation('{"draw": "{caption}"}')[0].value == '{"draw": "a {0}"}'


def test_a_sample_without_text_is_named() -> None:
    with pytest.raises(ValueError, match="'k' has neither turns nor a caption"):
        Sample("k", b"x").conversation(TEMPLATE)
