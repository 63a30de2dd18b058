from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rae_scale.data.record import Sample, Turn
from rae_scale.data.sources import Item, Source


def turns(question: str = "<image>\nWhat?", **before: str) -> list[dict[str, str]]:
    first = [{"from": "system", "value": before["system"]}] if before else []
    return [*first, {"from": "human", "value": question}, {"from": "gpt", "value": "That."}]


ROWS: list[dict[str, Any]] = [
    {"id": "a", "image": "coco/1.jpg", "conversations": turns()},
    {"id": "text", "conversations": turns("Hello")},
    {"id": "b", "image": "coco/2.x.png", "conversations": turns("And this?")},
    {"id": "many", "image": ["coco/1.jpg", "coco/2.x.png"], "conversations": turns()},
    {"id": "a2", "image": "coco/1.jpg", "conversations": turns(system="Answer with a word.")},
    {"id": "gone", "image": "coco/3.jpg", "conversations": turns()},
    {"id": "broken", "image": "coco/1.jpg", "conversations": turns()[:1]},
    {"id": "none", "image": "coco/1.jpg"},
    {"id": "blank", "image": "", "conversations": turns("Hello again")},
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "coco"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"one")
    (folder / "2.x.png").write_bytes(b"two")
    path = tmp_path / "Cambrian7M.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def told(items: list[Item]) -> dict[str, object]:
    """Key -> image bytes or None, or the reason for a refusal."""
    return {item.key: item.sample.image if item.sample else str(item.problem).split(":")[0] for item in items}


ALL = {
    "a": b"one",
    "text": None,
    "b": b"two",
    "many": "several images",
    "a2": b"one",
    "gone": "no image",
    "broken": "bad conversation",
    "none": "bad conversation",
    "blank": None,
}


def test_rows_find_their_images_in_a_folder(rows: Path, tmp_path: Path) -> None:
    assert told(list(Source(rows, "cambrian"))) == ALL
    moved = tmp_path / "elsewhere" / "rows.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(rows.read_bytes())
    assert told(list(Source(moved, "cambrian", {"images": str(tmp_path)}))) == ALL


def test_a_row_becomes_a_conversation(rows: Path) -> None:
    items = {item.key: item.sample for item in Source(rows, "cambrian")}
    assert items["a"] == Sample("a", b"one", (), (Turn("human", "<image>\nWhat?"), Turn("gpt", "That.")), {"id": "a"})
    system = items["a2"]
    assert system is not None and system.turns[0] == Turn("human", "Answer with a word.\n<image>\nWhat?")


@pytest.mark.parametrize("packed", [False, True])
def test_an_archive_of_images_finds_its_rows(rows: Path, pack: Callable[..., bytes], tmp_path: Path, packed) -> None:
    data = pack([("2.x.png", b"two"), ("1.jpg", b"one"), ("unused.jpg", b"x"), ("README.txt", b"x")])
    archive = tmp_path / ("part.tar.gz" if packed else "part.tar")
    archive.write_bytes(gzip.compress(data) if packed else data)
    source = Source(archive, "cambrian", {"rows": str(rows), "prefix": "coco/"})
    items = list(source)
    assert [item.key for item in items] == ["b", "a", "a2", "broken", "none"], "in the order of the images"
    assert told(items) == {key: ALL[key] for key in ("b", "a", "a2", "broken", "none")}
    assert source.adapter.side_files() == (rows,)
    by_folder = {item.key: item for item in Source(rows, "cambrian")}
    assert [item.sample for item in items] == [by_folder[item.key].sample for item in items]


def test_the_rows_that_no_archive_has_are_read_apart(rows: Path) -> None:
    rest = told(list(Source(rows, "cambrian", {"text_only": "true"})))
    assert rest == {key: ALL[key] for key in ("text", "many", "blank")}


def test_a_link_in_an_archive_is_refused_for_each_of_its_rows(rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("coco/1.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    items = list(Source(path, "cambrian", {"rows": str(rows)}))
    assert told(items) == dict.fromkeys(("a", "a2", "broken", "none"), "not a file")


def test_options_must_fit_the_input(rows: Path, tar: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"needs the file of rows about them: rows=Cambrian7M\.jsonl"):
        Source(tar([("1.jpg", b"x")]), "cambrian")
    with pytest.raises(ValueError, match=r"leave it out for a \.jsonl"):
        Source(rows, "cambrian", {"rows": str(rows)})


@pytest.mark.parametrize(
    "conversations", ["x", [], [1, 2], [{"from": "system"}], [{"from": "system"}, {"from": "gpt"}]]
)
def test_conversations_of_another_form_are_refused(tmp_path: Path, conversations: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": 7, "conversations": conversations}))
    assert told(list(Source(path, "cambrian"))) == {"7": "bad conversation"}
