from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

# `toy_model` lives beside the distributed tests, whose ranks import it by that name.
sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))

from toy_model import engine_config, group_of, optim, toy, train_step

from rae_scale.engines import Engine, build_engine
from rae_scale.parallel import Mesh

CPU = torch.device("cpu")


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(CPU)


@pytest.fixture
def build(mesh: Mesh) -> Callable[..., Engine]:
    def build(module: nn.Module | None = None, **settings: float | None) -> Engine:
        return build_engine(engine_config("eager"), optim(**settings), module or toy(), group_of, mesh)

    return build


@pytest.fixture
def engine(build: Callable[..., Engine]) -> Iterator[Engine]:
    """An engine after two steps: weights, moments and moving average all differ."""
    engine = build()
    for step in range(2):
        train_step(engine, step, 0, 1, 1)
    yield engine
    engine.close()
