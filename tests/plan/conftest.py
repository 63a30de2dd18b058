from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
# For `recorded`, and for models and harness of the tests of parallel layouts.
sys.path[:0] = [str(HERE), str(HERE.parent / "dist")]

from harness import run_ranks  # noqa: E402
from recorded import TENSOR_PARALLEL, Recorded, record_and_calibrate  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorded, Path, dict[str, Any]]:
    """One start of two processes for all that needs them: what a run of `TENSOR_PARALLEL` sends, the file of a
    calibration, and what it says."""
    folder = tmp_path_factory.mktemp("ranks")
    path = folder / "rates.json"
    (recorded, said), _ = run_ranks(record_and_calibrate, 2, folder, (TENSOR_PARALLEL, str(path)))
    return Recorded(*recorded), path, said
