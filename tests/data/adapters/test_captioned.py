"""The sets of images with one or two captions: FuseDiT's tars, CC12M with LLaVA-NeXT's captions, BLIP3o."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rae_scale.data.record import Sample
from rae_scale.data.sources import Item, Source

Read = Callable[..., list[Item]]


def reasons(items: list[Item]) -> list[str | None]:
    return [item.problem and item.problem.reason for item in items]


@pytest.fixture
def read(tar: Callable[..., Path]) -> Read:
    """read(adapter, members, name="a.tar", **options)"""

    def read(adapter: str, members: list[tuple[str, bytes]], name: str = "a.tar", **options: str) -> list[Item]:
        return list(Source(tar(members, name), adapter, options))

    return read


@pytest.mark.parametrize("joint", [".", "/"])
def test_fusedit_prefers_the_synthetic_caption(read: Read, joint: str) -> None:
    members = [
        (f"000{joint}image.jpg", b"pixels"),
        (f"000{joint}original_caption.txt", b"IMG_1.JPG"),
        (f"000{joint}synthetic_caption.txt", b"a red circle\n"),
    ]
    assert read("fusedit", members) == [
        Item("000", Sample("000", b"pixels", ("a red circle", "IMG_1.JPG"), (), {}, (0.95, 0.05)), "fusedit")
    ]
    (item,) = read("fusedit", members, original_weight="0.5")
    assert item.sample is not None and item.sample.caption_weights == (0.5, 0.5)


@pytest.mark.parametrize("original", [[], [("0.original_caption.txt", b" \n")]])
def test_fusedit_sets_without_an_original_caption(read: Read, original: list[tuple[str, bytes]]) -> None:
    (item,) = read("fusedit", [("0.image.jpg", b"pixels"), ("0.synthetic_caption.txt", b"a cat"), *original])
    assert item.sample == Sample("0", b"pixels", ("a cat",), (), {}, (1.0,))


def test_fusedit_samples_that_cannot_be_used(read: Read) -> None:
    items = read(
        "fusedit",
        [
            *[("0.image.jpg", b"x"), ("0.original_caption.txt", b"a cat")],
            *[("1.image.jpg", b"x"), ("1.synthetic_caption.txt", b"")],
            *[("2.synthetic_caption.txt", b"a cat")],
            *[("3.image.jpg", b"x"), ("3.synthetic_caption.txt", b"\xff")],
            *[("4.image.jpg", b"x"), ("4.image.png", b"x"), ("4.synthetic_caption.txt", b"a cat")],
        ],
    )
    assert reasons(items) == ["no caption", "empty text", "no image", "invalid text", "several images"]


@pytest.fixture
def llava(tmp_path: Path) -> str:
    lines = [{"key": "000000001", "caption_llava": " a red circle "}, {"key": 2, "caption_llava": "a cat"}]
    lines[0]["caption_llava_short"] = "a circle"
    lines += [{"key": "000000003", "caption_llava": ""}, {"caption_llava": "no key"}, {"key": "000000004"}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def cc12m(*keys: str) -> list[tuple[str, bytes]]:
    parts = [("jpg", b"pixels"), ("txt", b"alt"), ("json", b'{"url": "u"}')]
    return [(f"{key}.{suffix}", data) for key in keys for suffix, data in parts]


def test_cc12m_is_joined_with_its_captions_by_key(read: Read, llava: str) -> None:
    items = read("cc12m-llavanext", cc12m("000000001", "a/2"), captions=llava)
    assert [item.sample for item in items] == [
        Sample("000000001", b"pixels", ("a red circle", "a circle", "alt"), (), {"url": "u"}, (0.475, 0.475, 0.05)),
        Sample("a/2", b"pixels", ("a cat", "alt"), (), {"url": "u"}, (0.95, 0.05)),
    ]


def test_cc12m_images_without_a_caption(read: Read, llava: str) -> None:
    members = cc12m("000000003", "000000004", "000000005")
    assert reasons(read("cc12m-llavanext", members, captions=llava)) == ["empty text", "invalid text", "no caption"]
    items = read("cc12m-llavanext", members, captions=llava, without="alt-text")
    assert reasons(items) == ["empty text", "invalid text", None], "a line that is broken is not one that is missing"
    assert items[2].sample == Sample("000000005", b"pixels", ("alt",), (), {"url": "u"}, (1.0,))
    blank = [("000000005.jpg", b"pixels"), ("000000005.txt", b" ")]
    assert reasons(read("cc12m-llavanext", blank, captions=llava, without="alt-text")) == ["no caption"]


def test_cc12m_captions_that_are_still_packed(tar: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="unpack it first"):
        Source(tar(cc12m("1")), "cc12m-llavanext", {"captions": str(tmp_path / "train.jsonl.gz")})


def test_cc12m_says_which_other_file_it_is_made_from(tar: Callable[..., Path], llava: str) -> None:
    source = Source(tar(cc12m("000000001")), "cc12m-llavanext", {"captions": llava})
    assert source.adapter.side_files() == (Path(llava),)
    assert Source(tar(cc12m("1")), "blip3o").adapter.side_files() == ()


def test_blip3o(read: Read) -> None:
    items = read("blip3o", [("0.jpg", b"pixels"), ("0.txt", b"a cat"), ("1.jpg", b"x"), ("2.txt", b"a cat")])
    assert items[0].sample == Sample("0", b"pixels", ("a cat",))
    assert reasons(items) == [None, "no caption", "no image"]


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("object_1.tar", "object"),
        ("Text_2.tar", "text"),
        ("dalle3.tar", "dalle3"),
        ("human.tar", "human"),
        ("geneval_train.tar", "geneval_train"),
        ("00001.tar", "00001"),
    ],
)
def test_blip3o_60k_keeps_the_category(read: Read, name: str, category: str) -> None:
    (good, bad) = read("blip3o-60k", [("0.jpg", b"pixels"), ("0.txt", b"a cat"), ("1.jpg", b"x")], name)
    assert good.sample == Sample("0", b"pixels", ("a cat",), (), {"category": category})
    assert reasons([bad]) == ["no caption"]
