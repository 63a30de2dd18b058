"""Golden tensors: what the published modules computed, float32 on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

GOLDEN_DIR = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Golden:
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix`, without it."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def read_golden(name: str) -> Golden:
    with safe_open(GOLDEN_DIR / f"{name}.safetensors", "pt") as file:
        names = list(file.keys())
        return Golden(json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in names})


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """Read a golden file by its stem, for example `dit_tiny`."""
    return read_golden
