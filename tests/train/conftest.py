from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "dist")]  # for `tiny_world` and the harness that starts ranks

from tiny_world import TinyWorld, make_world  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Data, tokenizer and encoder, made once; nothing writes into them."""
    return make_world(tmp_path_factory.mktemp("world"))
