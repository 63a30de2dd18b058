"""Layouts of tars and JSON lines, read through `Source` as build and inspect read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from rae_scale.data import json_lines, text
from rae_scale.data.record import Sample, Turn
from rae_scale.data.sources import Item, Source

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle."}]
PARSED = (Turn("human", "<image>\nWhat is it?"), Turn("gpt", "A circle."))


def as_json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@pytest.fixture
def read(tar: Callable[..., Path]) -> Callable[[Iterable[tuple[str, bytes]]], list[Item]]:
    return lambda members: list(Source(tar(members)))


@pytest.fixture
def read_lines(tmp_path: Path) -> Callable[[Iterable[bytes]], list[Item]]:
    def read(lines: Iterable[bytes]) -> list[Item]:
        path = tmp_path / "folder" / "list.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\n".join(lines))
        return list(Source(path))

    return read


def reason(item: Item) -> str | None:
    assert (item.sample is None) != (item.problem is None)
    return item.problem.reason if item.problem else None


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_image_and_txt(read, suffix: str) -> None:
    items = read([(f"a/000.{suffix}", b"pixels"), ("a/000.txt", " a red circle\n".encode("utf-8-sig"))])
    assert items == [Item("a/000", Sample("a/000", b"pixels", ("a red circle",)), "image+txt")]


def test_image_and_txt_with_metadata(read) -> None:
    metadata = {"tag": "counting", "include": [{"class": "circle", "count": 2}], "prompt": "two circles"}
    (item,) = read([("000.png", b"pixels"), ("000.txt", b"two circles"), ("000.json", as_json(**metadata))])
    assert item.sample == Sample("000", b"pixels", ("two circles",), (), metadata)
    assert item.layout == "image+txt"


@pytest.mark.parametrize("joint", [".", "/"])
def test_synthetic_caption_comes_before_the_original_one(read, joint: str) -> None:
    (item,) = read(
        [
            (f"000{joint}image.jpg", b"pixels"),
            (f"000{joint}original_caption.txt", b"img_123.jpg"),
            (f"000{joint}synthetic_caption.txt", b"a red circle"),
        ]
    )
    assert item == Item("000", Sample("000", b"pixels", ("a red circle", "img_123.jpg")), "image+captions")


def test_an_empty_original_caption_is_left_out_and_an_empty_synthetic_one_is_not(read) -> None:
    items = read(
        [
            ("0.image.jpg", b"pixels"),
            ("0.synthetic_caption.txt", b"a red circle"),
            ("0.original_caption.txt", b" \n"),
            ("1.image.jpg", b"pixels"),
            ("1.synthetic_caption.txt", b" \n"),
            ("1.original_caption.txt", b"a red circle"),
        ]
    )
    assert items[0].sample is not None and items[0].sample.captions == ("a red circle",)
    assert reason(items[1]) == "empty text"


@pytest.mark.parametrize(
    ("fields", "captions"),
    [
        ({"caption": "one"}, ("one",)),
        ({"captions": ["one", "two"]}, ("one", "two")),
        ({"text": "one"}, ("one",)),
        ({"text": ["line one", "line two"]}, ("line one\nline two",)),
        ({"prompt": "one", "caption": "preferred"}, ("preferred",)),
        ({"ocr_annotation": {"text": ["line one", "line two"], "char": ["l"]}, "width": 9}, ("line one\nline two",)),
    ],
)
def test_captions_in_json(read, fields: dict[str, Any], captions: tuple[str, ...]) -> None:
    (item,) = read([("000.png", b"pixels"), ("000.json", as_json(**fields))])
    assert item.layout == "image+json"
    assert item.sample is not None
    assert item.sample.captions == captions
    assert item.sample.metadata == {name: value for name, value in fields.items() if name != "ocr_annotation"}


@pytest.mark.parametrize("order", [1, -1])
def test_official_samples_name_their_image(read, order: int) -> None:
    members = [
        ("set/sample_0.json", as_json(conversations=TURNS, metadata={"id": 7}, image_filename="photo.jpg")),
        ("set/photo.jpg", b"pixels"),
    ]
    assert read(members[::order]) == [
        Item("set/sample_0", Sample("set/sample_0", b"pixels", (), PARSED, {"id": 7}), "conversations")
    ]


def test_official_samples_may_share_the_name_of_their_image_or_have_none(read) -> None:
    text_only = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    items = read(
        [
            ("sample_0.json", as_json(conversations=TURNS, metadata={}, image_filename="sample_0.jpg")),
            ("sample_0.jpg", b"pixels"),
            ("sample_1.json", as_json(conversations=text_only, metadata=None, image_filename=None)),
        ]
    )
    assert [item.sample and item.sample.image for item in items] == [b"pixels", None]
    assert items[1].sample is not None and items[1].sample.turns[0].value == "Hello"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("0.jpg", b"x")], "no caption"),
        ([("0.jpg", b"x"), ("0.cls", b"7")], "no caption"),
        ([("0.txt", b"x")], "no image"),
        ([("0.jpg", b"x"), ("0.png", b"x"), ("0.txt", b"x")], "several images"),
        ([("0.jpg", b"x"), ("0.txt", b"")], "empty text"),
        ([("0.jpg", b"x"), ("0.txt", b" \n\t")], "empty text"),
        ([("0.jpg", b"x"), ("0.txt", b"\xff\xfe")], "invalid text"),
        ([("0.jpg", b"x"), ("0.txt", b"a\0b")], "invalid text"),
        ([("0.jpg", b"x"), ("0.txt", b"draw <image>")], "invalid text"),
        ([("0.jpg", b"x"), ("0.txt", b"x" * 2**20)], "text too long"),
        ([("0.jpg", b"x"), ("0.json", b"{")], "bad json"),
        ([("0.jpg", b"x"), ("0.json", b"[1]")], "bad json"),
        ([("0.jpg", b"x"), ("0.json", b'{"a":' * 100_000)], "bad json"),
        ([("0.jpg", b"x"), ("0.json", b'{"a":' + b"9" * 5000 + b"}")], "bad json"),
        ([("0.jpg", b"x"), ("0.json", b"\xff")], "invalid text"),
        ([("0.jpg", b"x"), ("0.json", as_json(caption=3))], "invalid text"),
        ([("0.jpg", b"x"), ("0.json", as_json(caption="\ud800"))], "invalid text"),
        ([("0.jpg", b"x"), ("0.json", as_json(caption=[]))], "no caption"),
        ([("0.json", as_json(conversations=TURNS, image_filename="gone.jpg"))], "no image"),
        ([("0.json", as_json(conversations=TURNS))], "no image"),
        ([("0.jpg", b"x"), ("0.json", as_json(conversations=[TURNS[0], TURNS[0]]))], "bad conversation"),
        ([("0.jpg", b"x"), ("0.json", as_json(conversations=TURNS[1:]))], "bad conversation"),
        ([("0.jpg", b"x"), ("0.json", as_json(conversations=["a", "b"]))], "bad conversation"),
        ([("0.jpg", b"x"), ("0.json", as_json(conversations="hello"))], "bad conversation"),
        ([("0.jpg", b"x"), ("0.json", as_json(conversations=[TURNS[0], {"from": "gpt"}]))], "invalid text"),
        ([("0.jpg", b"x"), ("0.json", as_json(conversations=TURNS * 2))], "several images"),
    ],
)
def test_what_cannot_be_used_is_rejected_with_a_reason(read, members: list[tuple[str, bytes]], expected: str) -> None:
    good = [("good.jpg", b"pixels"), ("good.txt", b"a red circle")]
    items = read([*members, *good])
    assert [reason(item) for item in items] == [expected, None]


def test_damage_is_reported_after_the_complete_samples(pack, tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes(pack([("0.jpg", b"x"), ("0.txt", b"a"), ("1.jpg", b"x" * 2000), ("1.txt", b"b")])[:4000])
    source = Source(path)
    assert [reason(item) for item in source] == [None, "truncated member"]
    assert source.damage


def test_json_lines_find_images_beside_the_file(read_lines, tmp_path: Path) -> None:
    (tmp_path / "folder" / "images").mkdir(parents=True)
    (tmp_path / "folder" / "images" / "a.jpg").write_bytes(b"pixels")
    items = read_lines(
        [
            as_json(id="first", image="images/a.jpg", conversations=TURNS, metadata={"from": "x"}),
            b"",
            as_json(image="images/a.jpg", caption="a red circle"),
        ]
    )
    assert items == [
        Item("first", Sample("first", b"pixels", (), PARSED, {"id": "first", "from": "x"}), "jsonl"),
        Item("line 3", Sample("line 3", b"pixels", ("a red circle",), (), {"caption": "a red circle"}), "jsonl"),
    ]


def test_bad_lines_are_rejected_with_a_reason(read_lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 300)
    lines = {
        b"{": "bad json",
        b"\xff": "invalid text",
        b" " * 400 + b"x" * 1000: "bad json",
        as_json(image="gone.jpg", caption="a"): "no image",
        as_json(image=["a.jpg", "b.jpg"], caption="a"): "several images",
        as_json(image="a\0b.jpg", caption="a"): "bad name",
        as_json(image="/dev/zero", caption="a"): "no image",
        as_json(image="n" * 256, caption="a"): "no image",
        as_json(caption="a"): "no image",
        as_json(image=3, caption="a"): "bad name",
        as_json(): "no caption",
    }
    assert [reason(item) for item in read_lines(lines)] == list(lines.values())


@pytest.mark.parametrize("name", ["a.zip", "folder", "a.json"])
def test_an_unknown_kind_of_input_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="unknown kind of input"):
        Source(tmp_path / name)


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.tar: no such file"):
        Source(tmp_path / "gone.tar")


def test_captions_of_the_greatest_length_pass(read) -> None:
    (item,) = read([("0.jpg", b"x"), ("0.txt", b"x" * text.MAX_TEXT_LENGTH)])
    assert reason(item) is None
