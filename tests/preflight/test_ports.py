"""Who holds a port, read from a made-up /proc."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rae_scale.preflight import ports

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
LISTENS = "   0: 0100007F:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 77 1\n"
CONNECTED = "   1: 0100007F:{port:04X} 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 78 1\n"


@pytest.fixture(autouse=True)
def _proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 12 listens on port 29500, process 13 is connected to it."""
    (tmp_path / "net").mkdir()
    (tmp_path / "net/tcp").write_text(HEAD + LISTENS.format(port=29500) + CONNECTED.format(port=29500))
    for pid, inode in ((12, 77), (13, 78)):
        (tmp_path / f"{pid}/fd").mkdir(parents=True)
        (tmp_path / f"{pid}/fd/3").symlink_to(f"socket:[{inode}]")
        (tmp_path / f"{pid}/cmdline").write_bytes(b"python\0-m\0rae_scale\0train\0")
    monkeypatch.setattr(ports, "PROC", tmp_path)


def test_the_listener_is_named() -> None:
    assert ports.listener(29500) == "pid 12 (python -m rae_scale train)"


def test_nobody_can_be_named() -> None:
    assert ports.listener(29501) == "a process of another user or container"


def test_a_file_that_closes_meanwhile_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10, 30):
        (tmp_path / f"12/fd/{number}").symlink_to("closed" if number % 2 else f"file {number}")
    real = os.readlink

    def readlink(path: Path) -> str:
        if real(path) == "closed":
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(os, "readlink", readlink)
    found = ports.open_files(tmp_path / "12")
    assert found == {"socket:[77]", *(f"file {number}" for number in range(10, 30, 2))}
