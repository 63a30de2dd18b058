"""`rae-scale preflight`: what it prints, and its exit status. What it finds is tested in tests/preflight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Rae = Callable[..., str]
RUN_FILE = Path(__file__).resolve().parents[2] / "configs/run/demo-encoder.yaml"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_a_machine_in_good_order(rae: Rae, tmp_path: Path) -> None:
    printed = rae("preflight", RUN_FILE, f"run.dir={tmp_path}", "--only", "run-dir")
    assert "run-dir" in printed
    assert printed.splitlines()[-1] == "ready to start: 2 ok, 0 to look at, 0 failed"


def test_data_that_are_not_there(rae: Rae, tmp_path: Path) -> None:
    data = f"data.sources=[{{path: {tmp_path / 'none'}}}]"
    assert rae("preflight", RUN_FILE, f"run.dir={tmp_path}", data, "--only", "data", "--json", status=1) == ""


def test_json(rae: Rae, tmp_path: Path) -> None:
    found = json.loads(rae("preflight", RUN_FILE, f"run.dir={tmp_path}", "--json", "--only", "run-dir"))
    assert found["ok"] is True
    assert [finding["check"] for finding in found["findings"]] == ["ranks", "run-dir"]


def test_mistakes_are_one_line(rae: Rae) -> None:
    assert rae("preflight", RUN_FILE, "--skip", "dsk", status=2).startswith(
        "rae-scale: error: --skip='dsk' is no check"
    )
