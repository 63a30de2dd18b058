"""Small corpora, and builders in processes of their own that are killed at a chosen point."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SHARD_BYTES = 3000

# Runs at the start of every Python process that finds it on its path. The process dies at the KILL_AT-th time that it
# opens, makes, renames or removes something below KILL_BELOW: KILL_ROLE says whether the builder or its workers do.
SITE = """
import os, signal, sys

role = "worker" if "--multiprocessing-fork" in sys.orig_argv else "builder"
seen = 0

def count(event, arguments):
    global seen
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        return
    path = arguments[0]
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(os.environ["KILL_BELOW"]):
        return
    seen += 1
    if seen == int(os.environ["KILL_AT"]):
        try:
            if os.environ["KILL_ONCE"]:
                os.close(os.open(os.environ["KILL_ONCE"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("KILL_ROLE") == role:
    sys.addaudithook(count)
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def corpus(tar, image) -> Callable[..., list[Path]]:
    """corpus(n, picture=image) -> n tars of four good samples each, and a bad one in every second.

    picture(seed=) gives the encoded images.
    """

    def write(count: int, picture: Callable[..., bytes] = image) -> list[Path]:
        paths = []
        for number in range(count):
            members = []
            for i in range(10 * number, 10 * number + 4):
                members += [(f"{i}.jpg", picture(seed=i)), (f"{i}.txt", f"caption {i}".encode())]
            bad = [("bad.jpg", b"no image"), ("bad.txt", b"a")] if number % 2 else []
            paths.append(tar(members + bad, f"in-{number}.tar"))
        return paths

    return write


@pytest.fixture
def builder(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """builder(*arguments, kill_at=, role=, below=, once=) -> `rae-scale data build` in a process of its own.

    Returns when the last of its processes has ended: they all hold its standard error.
    """
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)

    def run(
        *arguments: object,
        kill_at: int | None = None,
        role: str = "builder",
        below: Path | None = None,
        once: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(tmp_path / "site"), os.getcwd(), *filter(None, [environment.get("PYTHONPATH")])]
        )
        if kill_at is not None:
            marker = tmp_path / "killed"
            marker.unlink(missing_ok=True)
            environment |= {"KILL_ROLE": role, "KILL_AT": str(kill_at), "KILL_BELOW": str(below)}
            environment["KILL_ONCE"] = str(marker) if once else ""
        command = [sys.executable, "-m", "rae_scale", "data", "build", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)

    return run


KILLED = -signal.SIGKILL
