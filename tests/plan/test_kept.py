"""A trace is made once for a model and the code that planned it, and read from disk after that."""

from __future__ import annotations

from pathlib import Path

import pytest

from rae_scale.config import Config
from rae_scale.parallel import same
from rae_scale.plan import kept as module
from rae_scale.plan.kept import VARIABLE, kept
from rae_scale.plan.timeline import Interval
from rae_scale.plan.trace import Key, Trace, key_of

KEY = key_of(Config(), 4, 300, 40, "auto")
MADE = Trace((Interval("start", 1, 2, 3, 4, 5, 6), Interval("DiT 0", 2, 7, 9, 9, 0)), {"DiT": 32})


class Maker:
    def __init__(self) -> None:
        self.made: list[Key] = []

    def __call__(self, key: Key) -> Trace:
        self.made.append(key)
        return MADE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "plans"))
    return tmp_path / "plans"


def test_made_once(folder: Path) -> None:
    make = Maker()
    assert kept(make, KEY, Trace) == kept(make, KEY, Trace) == MADE
    assert make.made == [KEY]
    assert len(list(folder.iterdir())) == 1


def test_other_keys_and_other_code_are_traced_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Maker()
    kept(make, KEY, Trace)
    kept(make, key_of(Config(), 5, 300, 40, "auto"), Trace)
    monkeypatch.setattr(module, "code", lambda: "another version")
    kept(make, KEY, Trace)
    assert len(make.made) == 3


@pytest.mark.parametrize("content", ["", "{}", '{"intervals": [{"name": 1}], "stacks": {}}', "[1]"])
def test_a_broken_file_is_replaced(folder: Path, content: str) -> None:
    make = Maker()
    kept(make, KEY, Trace)
    (file,) = folder.iterdir()
    file.write_text(content)
    assert kept(make, KEY, Trace) == MADE
    assert kept(make, KEY, Trace) == MADE
    assert len(make.made) == 2


def test_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Maker()
    monkeypatch.setenv(VARIABLE, "")
    kept(make, KEY, Trace)
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))  # no folder can be made there
    assert kept(make, KEY, Trace) == MADE
    assert len(make.made) == 2


def test_the_code_is_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file more, or another byte in one, is other code."""
    hashes = []
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(same, "PACKAGES", ("toy_package",))
    for name, text in (("__init__.py", "1"), ("__init__.py", "2"), ("b/c.py", "")):
        path = tmp_path / "toy_package" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        hashes.append(module.code.__wrapped__())
    assert len(set(hashes)) == 3


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert module.folder() == Path("/there/rae-scale/plan")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert module.folder() == Path("/home/somebody/.cache/rae-scale/plan")
