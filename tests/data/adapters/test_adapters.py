"""What holds for every adapter, and how they are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from rae_scale.data.adapters import ADAPTERS, adapter_options, make_adapter
from rae_scale.data.sources import Source

NEEDED = {"cc12m-llavanext": {"captions": "train.jsonl"}}


def test_an_unknown_adapter_lists_the_names() -> None:
    with pytest.raises(ValueError, match="'laion' is not known; choose one of auto, blip3o, blip3o-60k, cambrian, "):
        make_adapter("laion")


def test_an_unknown_option_lists_the_options() -> None:
    with pytest.raises(ValueError, match="no option 'caption'; its options are captions, style"):
        make_adapter("rendered-text", {"caption": "2"})
    with pytest.raises(ValueError, match="'auto' has no option 'x'; it has none"):
        make_adapter("auto", {"x": "1"})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("rendered-text", {"captions": "two"}, "captions=two: a number is expected"),
        ("rendered-text", {"captions": "2.5"}, "a number is expected"),
        ("rendered-text", {"style": "yes"}, "style=yes: give true or false"),
        ("fusedit", {"original_weight": "x"}, "original_weight=x: a number is expected"),
        ("fusedit", {"original_weight": "1.5"}, "choose 0 to 1"),
        ("fusedit", {"original_weight": "nan"}, "choose 0 to 1"),
        ("cc12m-llavanext", {}, "needs the option captions; give --adapter-option captions="),
        ("cc12m-llavanext", {"captions": "a.jsonl", "without": "x"}, "choose reject or alt-text"),
        ("rendered-text", {"captions": "0"}, "choose 1 to 6"),
        ("cambrian", {"rows": "a.jsonl", "images": "b"}, "give one or the other"),
        ("cambrian", {"images": "b", "text_only": "true"}, "leave images out"),
        ("cambrian", {"prefix": "coco/"}, "give rows as well"),
    ],
)
def test_options_that_cannot_be_are_refused(name: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_adapter(name, options)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_says_what_it_reads(name: str) -> None:
    kind = ADAPTERS[name]
    adapter = make_adapter(name, NEEDED.get(name))
    assert adapter.name == name == kind.name
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("), "its layout and source"
    assert set(adapter_options(name)) == {field.name for field in fields(kind)}
    for option in fields(kind):
        assert f"{option.name}:" in kind.__doc__, option.name


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - {"auto"}))
def test_hostile_members_are_refused_by_every_adapter(name: str, tar: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"key": "good", "caption_llava": "a cat", "image": "good.jpg"}\n')
    options = {
        "cc12m-llavanext": {"captions": str(tmp_path / "train.jsonl")},
        "cambrian": {"rows": str(tmp_path / "train.jsonl")},
    }
    members = [("../up.jpg", b"x"), ("/etc/x.txt", b"x"), ("noname", b"x"), ("empty.jpg", b""), ("empty.txt", b"")]
    source = Source(tar(members), name, options.get(name))
    items = list(source)
    assert all(item.sample is None and item.problem is not None for item in items)
    assert name == "cambrian" or [item.problem.reason for item in items][:3] == ["bad name"] * 3


def test_missing_files_beside_the_input_are_named(tar: Callable[..., Path], tmp_path: Path) -> None:
    archive = tar([("0.jpg", b"x")])
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: no such file"):
        Source(archive, "cc12m-llavanext", {"captions": str(tmp_path / "gone.jsonl")})
    with pytest.raises(FileNotFoundError, match="no such folder"):
        (tmp_path / "rows.jsonl").write_text("")
        Source(tmp_path / "rows.jsonl", "cambrian", {"images": str(tmp_path / "gone")})
    for piece in ("allava.tar.gz_part1", "partII.tar.gz_part_aa"):
        with pytest.raises(ValueError, match="join the pieces first"):
            Source(tmp_path / piece)
    with pytest.raises(ValueError, match=r"adapter 'fusedit'; give a \.tar or \.tar\.gz or \.tgz file"):
        Source(tmp_path / "rows.jsonl", "fusedit")
