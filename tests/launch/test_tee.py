"""Output on the terminal and in the log."""

from __future__ import annotations

import os
from pathlib import Path

from rae_scale.launch.tee import Log, Tee


def copy(tmp_path: Path, chunks: list[bytes], prefix: bytes = b"", read_terminal: bool = True) -> tuple[bytes, bytes]:
    """What arrives on the terminal and in the log."""
    source, write = os.pipe()
    terminal, tty = os.pipe()
    if not read_terminal:
        os.close(terminal)
    log = Log(tmp_path / "logs" / "node.log")
    tee = Tee(os.fdopen(source, "rb", buffering=0), tty, log, prefix)
    for chunk in chunks:
        os.write(write, chunk)
    os.close(write)
    tee.join()
    os.close(tty)
    log.close()
    seen = b""
    if read_terminal:
        with open(terminal, "rb") as stream:
            seen = stream.read()
    assert tee.hung_up.is_set() != read_terminal
    return seen, log.path.read_bytes()


def test_both_get_everything(tmp_path: Path) -> None:
    assert copy(tmp_path, [b"step 1\nste", b"p 2\n"]) == (b"step 1\nstep 2\n",) * 2


def test_lines_of_several_machines_are_told_apart(tmp_path: Path) -> None:
    seen, logged = copy(tmp_path, [b"a\nb\n"], prefix=b"[node 1] ")
    assert seen == logged == b"[node 1] a\n[node 1] b\n"


def test_a_log_is_appended_to(tmp_path: Path) -> None:
    copy(tmp_path, [b"first\n"])
    assert copy(tmp_path, [b"second\n"])[1] == b"first\nsecond\n"


def test_the_log_goes_on_without_a_terminal(tmp_path: Path) -> None:
    assert copy(tmp_path, [b"a\n"], read_terminal=False) == (b"", b"a\n")


def test_a_full_disk_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "node.log").symlink_to("/dev/full")
    source, write = os.pipe()
    terminal, tty = os.pipe()
    log = Log(tmp_path / "logs" / "node.log")
    tee = Tee(os.fdopen(source, "rb", buffering=0), tty, log)
    os.write(write, b"step 1\n")
    os.close(write)
    tee.join()
    os.close(tty)
    with open(terminal, "rb") as stream:
        assert stream.read() == b"step 1\n"
