from __future__ import annotations

from pathlib import Path

import pytest

from tests.security.hostile import Canary, check_that_it_sings


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    made = Canary(tmp_path / "canary-has-run")
    check_that_it_sings(made)
    return made
