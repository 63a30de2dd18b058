"""A small data set of three units, as a build makes it: with rejected samples, a duplicate, several shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rae_scale.data.build import BuildOptions, build


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test builds what all get a copy of."""
    return tmp_path_factory.mktemp("looking") / "built"


@pytest.fixture
def built(tar: Callable[..., Path], image: Callable[..., bytes], original: Path, tmp_path: Path) -> Path:
    """Units 00000-web-0 (7 of 10 samples in 2 shards), 00001-web-1 (none of 1), 00002-flux-0 (3 of 3).

    In 00000-web-0, two are rejected and one is a duplicate.
    """
    if not original.exists():
        make(original, tar, image)
    return shutil.copytree(original, tmp_path / "built")


def make(folder: Path, tar: Callable[..., Path], image: Callable[..., bytes]) -> None:
    good = [
        (f"{number}.{kind}", data)
        for number in range(7)
        for kind, data in (("jpg", image(seed=number)), ("txt", f"caption {number}".encode()))
    ]
    bad = [("8.jpg", b"no image"), ("8.txt", b"a"), ("9.txt", b"no picture")]
    again = [("7.jpg", image(seed=0)), ("7.txt", b"caption 0")]
    tars = [
        tar([*good, *again, *bad], "web-0.tar"),
        tar(bad[:2], "web-1.tar"),
        tar([pair for number in range(3) for pair in sample(number, image)], "flux-0.tar"),
    ]
    build(tars, folder, BuildOptions(shard_bytes=4000, dedup="exact"))


def sample(number: int, image: Callable[..., bytes]) -> list[tuple[str, bytes]]:
    texts = json.dumps({"text": f"flux {number}"}).encode()
    return [(f"{number}.png", image("PNG", width=30 + number, height=20)), (f"{number}.json", texts)]


@pytest.fixture
def edit() -> Callable[[Path, Callable[[dict], None]], None]:
    """edit(path, change): let `change` alter the object in a JSON file."""

    def write(path: Path, change: Callable[[dict], None]) -> None:
        content = json.loads(path.read_bytes())
        change(content)
        path.write_text(json.dumps(content))

    return write
