"""Compiled blocks under every engine and layout that takes them train as one process does without compilation."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path

import pytest
from harness import run_ranks
from parity import Variant, check_parity, sharded, train_alone

import rae_scale.engines.build
from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel import compile_blocks, init_distributed, shutdown_distributed

pytestmark = pytest.mark.dist


def train_compiled(sizes: dict[str, int], engines: list[str], checkpointing: str, reference: str) -> None:
    """Without code generation, which takes minutes on every rank: what could go wrong here is the tracing."""
    rae_scale.engines.build.compile_blocks = functools.partial(compile_blocks, backend="aot_eager")
    parallel = ParallelConfig(**sizes)
    init_distributed(parallel, "cpu")
    trained = pickle.loads(Path(reference).read_bytes())
    for engine in engines:
        cfg = sharded(engine, compile="blocks", activation_checkpointing=checkpointing)
        check_parity(cfg, parallel, Variant(), trained, Path(reference).parent)
    shutdown_distributed()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("alone")
    (folder / "reference").write_bytes(pickle.dumps(train_alone(Variant(), folder)))
    return str(folder / "reference")


@pytest.mark.parametrize(
    ("sizes", "engines", "checkpointing"),
    [
        ({"tp": 2}, ["fsdp2"], "none"),
        pytest.param({"tp": 2, "sp": 2}, ["fsdp2", "zero1"], "full", marks=pytest.mark.matrix),
        pytest.param({"dp_shard": 2}, ["fsdp2", "zero1", "zero2"], "none", marks=pytest.mark.matrix),
    ],
)
def test_parity(sizes: dict[str, int], engines: list[str], checkpointing: str, reference: str, tmp_path: Path) -> None:
    world = ParallelConfig(**sizes).world_size
    run_ranks(train_compiled, world, tmp_path, args=(sizes, engines, checkpointing, reference), timeout=600)
