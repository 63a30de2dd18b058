from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "dist")]  # for `tiny_world` and the harness that starts ranks

from tiny_world import TinyWorld, make_world  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Data, tokenizer and encoder, made once; nothing writes into them."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def decoder(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of decoder weights, as the decoder stage and the export make it."""
    from rae_scale.infer.export import export
    from rae_scale.train import train

    folder = tmp_path_factory.mktemp("decoder")
    train(world.config(folder / "run", stage="decoder", run__max_steps=1))
    return str(export(folder / "run", folder / "weights"))
