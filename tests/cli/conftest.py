from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from rae_scale.cli.main import main


@pytest.fixture
def rae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a rae-scale command in this process; returns what it printed, on stderr if `status` is not 0."""

    def run(*arguments: object, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["rae-scale", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert (stopped.value.code or 0) == status, printed.err
        return printed.err if status else printed.out

    return run
