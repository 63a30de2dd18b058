"""Temporary files of a launch go with it, and those of a killed one with the next."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rae_scale.launch.temporary import NAME, TemporaryFolder, remove_stale

KILLED = "from rae_scale.launch.temporary import TemporaryFolder; print(TemporaryFolder(31996).path)"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_is_removed_with_what_is_in_it(temporary: Path) -> None:
    folder = TemporaryFolder(31996)
    assert NAME.fullmatch(folder.path.name)
    assert folder.variables()["TMPDIR"] == str(folder.path)
    assert not folder.variables()["TORCHINDUCTOR_CACHE_DIR"].startswith(str(folder.path))
    (folder.path / "torchelastic_x").mkdir()
    folder.remove()
    assert list(temporary.iterdir()) == []


def test_only_those_of_dead_launches_are_stale(temporary: Path) -> None:
    ours = TemporaryFolder(31996)
    (temporary / "rae-launch-notes").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED], env={"TMPDIR": str(temporary)}, capture_output=True, text=True, check=True
    )
    left = Path(done.stdout.strip())
    assert left.exists()
    remove_stale()
    assert sorted(path.name for path in temporary.iterdir()) == sorted([ours.path.name, "rae-launch-notes"])
