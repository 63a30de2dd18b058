from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rae_scale.data import json_lines
from rae_scale.data.adapters.line_index import HEADER, LineIndex


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"key": f"k{number % 40}", "value": number} for number in range(100)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def found(index: LineIndex, value: str) -> list[object]:
    return [json.loads(line.content())["value"] for line in index.find(value)]


def test_lines_are_found_in_the_order_of_the_file(path: Path) -> None:
    index = LineIndex(path, "key")
    assert found(index, "k3") == [3, 43, 83]
    assert found(index, "k39") == [39, 79]
    assert found(index, "k40") == found(index, "") == []
    assert found(LineIndex(path, "value"), "17") == [17]


def test_the_index_is_made_once_and_again_after_a_change(path: Path) -> None:
    LineIndex(path, "key")
    table = path.with_name("rows.jsonl.key.index")
    assert table.stat().st_size == HEADER.size + 16 * 100
    made = table.stat().st_mtime_ns, table.stat().st_ino
    assert found(LineIndex(path, "key"), "k3") == [3, 43, 83]
    assert (table.stat().st_mtime_ns, table.stat().st_ino) == made
    path.write_text('{"key": "k3", "value": 7}\n')
    assert found(LineIndex(path, "key"), "k3") == [7]
    state = path.stat()
    path.write_text('{"key": "k3", "value": 8}\n')
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert found(LineIndex(path, "key"), "k3") == [8]


def test_values_of_equal_hash_are_told_apart(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rae_scale.data.adapters.line_index.hash_of", lambda value: 1)
    assert found(LineIndex(path, "key"), "k3") == [3, 43, 83]


def test_long_lines_are_read_whole(path: Path) -> None:
    long = {"key": "long", "value": "x" * 50_000}
    path.write_text(json.dumps(long) + "\n" + json.dumps({"key": "b", "value": 1}) + "\n" + json.dumps(long))
    index = LineIndex(path, "key")
    assert found(index, "long") == [long["value"]] * 2, "also the last one, which has no end of line"
    assert found(index, "b") == [1]


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff", b" " * 50])
def test_a_file_with_a_broken_line_is_refused(path: Path, line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 40)
    path.write_bytes(b'{"key": "a"}\n' + (line if line.strip() else line + b"x") + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: .*repair or remove the line"):
        LineIndex(path, "key")
    assert not path.with_name("rows.jsonl.key.index").exists()


def test_an_empty_file_has_no_lines(path: Path) -> None:
    path.write_text("\n")
    assert found(LineIndex(path, "key"), "a") == []


def test_a_folder_that_cannot_be_written_is_named(path: Path) -> None:
    path.with_name("rows.jsonl.key.index.lock").mkdir()
    with pytest.raises(ValueError, match=r"cannot be written .*copy the file to a folder that can be written"):
        LineIndex(path, "key")
