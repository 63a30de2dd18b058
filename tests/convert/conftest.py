from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

# `harness` and `awkward` live beside the distributed tests, whose ranks import them by these names.
sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))

from rae_scale.models.ddt import DDTHeadConfig
from rae_scale.models.zoo import DIT_ZOO
from tests.convert.made import save_made
from tests.train.tiny_world import TinyWorld, make_world

DDT = "dit-tiny-ddt"


@dataclass(frozen=True)
class Runs:
    """Run folders, made once; nothing writes into them.

    untied, tied: text-to-image models whose output layer is, or is not, a matrix of its own.
    ddt: one with the wide head. decoder: of stage decoder.
    """

    world: TinyWorld
    untied: Path
    tied: Path
    ddt: Path
    decoder: Path


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("convert")
    world = make_world(folder)
    # A width whose SwiGLU, of 213, is padded.
    DIT_ZOO[DDT] = replace(DIT_ZOO["dit-tiny"], ddt=DDTHeadConfig(hidden_size=80, depth=1, num_heads=4))
    yield Runs(
        world,
        untied=save_made(world.config(folder / "untied")),
        tied=save_made(world.config(folder / "tied", model__llm__name="qwen2-demo")),
        ddt=save_made(world.config(folder / "ddt", model__name=DDT)),
        decoder=save_made(world.config(folder / "decoder-run", stage="decoder")),
    )
    del DIT_ZOO[DDT]
