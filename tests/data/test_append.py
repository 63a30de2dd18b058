from __future__ import annotations

import os
from pathlib import Path

import pytest

from rae_scale.data.append import AppendedLines


def test_lines_of_several_writers_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines"
    for text in (b"a\n", b"b\n"):
        lines = AppendedLines(path)
        lines.add(text)
        lines.write()
        lines.write()
    assert path.read_bytes() == b"a\nb\n"


def test_without_lines_there_is_no_file(tmp_path: Path) -> None:
    AppendedLines(tmp_path / "lines").write()
    assert list(tmp_path.iterdir()) == []


def test_on_a_full_disk_lines_wait_and_it_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lines"
    path.symlink_to("/dev/full")
    lines = AppendedLines(path)
    for text in (b"a\n", b"b\n"):
        lines.add(text)
        lines.write()
    assert lines.waiting == [b"a\n", b"b\n"]
    assert len(caplog.records) == 1 and "No space left on device" in caplog.text
    path.unlink()
    lines.write()
    assert (path.read_bytes(), lines.waiting) == (b"a\nb\n", [])
    assert "nothing is missing" in caplog.text


def test_a_line_with_room_for_a_part_is_written_again_on_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, room = os.write, [100, 3, 2]
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[: room.pop(0) if room else 100]))
    lines = AppendedLines(tmp_path / "lines")
    for text in (b"first\n", b"second\n", b"third\n"):
        lines.add(text)
    for left in (2, 2, 0):
        lines.write()
        assert len(lines.waiting) == left
    assert (tmp_path / "lines").read_bytes() == b"first\nsec\ns\nsecond\nthird\n"
