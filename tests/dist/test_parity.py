"""Every layout trains as one process does."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from parity import Trained, Variant, check_bf16, check_parity, sharded, train_alone

from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel import init_distributed, shutdown_distributed

pytestmark = pytest.mark.dist

ENGINES = ("zero1", "zero2", "zero3", "fsdp2")
VARIANTS = [Variant(ddt, llm_trains) for ddt in (True, False) for llm_trains in (True, False)]


def train_layouts(sizes: dict[str, int], runs: list[tuple[str, Variant]], references: str) -> None:
    """On each rank: every (engine, variant) of one mesh, one after the other."""
    parallel = ParallelConfig(**sizes)
    init_distributed(parallel, "cpu")
    trained: dict[Variant, Trained] = pickle.loads(Path(references).read_bytes())
    for engine, variant in runs:
        if engine.endswith("-bf16"):
            check_bf16(engine.removesuffix("-bf16"), parallel, trained[variant], Path(references).parent)
            continue
        check_parity(sharded(engine), parallel, variant, trained[variant], Path(references).parent)
    shutdown_distributed()


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("alone")
    trained = {variant: train_alone(variant, folder) for variant in VARIANTS}
    (folder / "references").write_bytes(pickle.dumps(trained))
    return str(folder / "references")


def world(sizes: dict[str, int]) -> int:
    return ParallelConfig(**sizes).world_size


@pytest.mark.parametrize(
    ("sizes", "runs"),
    [
        (
            {"tp": 2, "sp": 2},
            [("fsdp2", VARIANTS[0]), ("zero3", VARIANTS[0]), ("fsdp2-bf16", VARIANTS[0]), ("zero3-bf16", VARIANTS[0])],
        ),
        pytest.param(
            {"tp": 2, "dp_shard": 2},
            [("zero3", VARIANTS[0]), ("fsdp2", VARIANTS[1]), ("zero1", VARIANTS[2])],
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"sp": 2, "dp_shard": 2},
            [("zero2", VARIANTS[0]), ("zero3", VARIANTS[1]), ("fsdp2", VARIANTS[2])],
            marks=pytest.mark.long,
        ),
    ],
    ids=["tp2-sp2", "tp2-dp2", "sp2-dp2"],
)
def test_quick(sizes: dict[str, int], runs: list[tuple[str, Variant]], references: str, tmp_path: Path) -> None:
    run_ranks(train_layouts, world(sizes), tmp_path, args=(sizes, runs, references))


@pytest.mark.matrix
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("sp", [1, 2])
@pytest.mark.parametrize("dp", [1, 2, 3])
def test_matrix(tp: int, sp: int, dp: int, references: str, tmp_path: Path) -> None:
    sizes = {"tp": tp, "sp": sp, "dp_shard": dp}
    runs = list(itertools.product(ENGINES, VARIANTS))
    run_ranks(train_layouts, world(sizes), tmp_path, args=(sizes, runs, references), timeout=3000)


OPTIONS = [
    ({"dp_shard": 2, "tp": 2}, "zero3", {"zero_hpz": 2}),
    ({"dp_shard": 4}, "zero3", {"zero_hpz": 2}),
    ({"dp_shard": 2, "tp": 2}, "zero3", {"offload_optimizer": True}),
    ({"sp": 2, "tp": 2}, "fsdp2", {"offload_optimizer": True}),
    *(
        ({"sp": 2, "tp": 2}, engine, {"activation_checkpointing": mode})
        for engine in ("zero3", "fsdp2")
        for mode in ("full", "selective")
    ),
]


def train_with_option(sizes: dict[str, int], engine: str, settings: dict[str, Any], references: str) -> None:
    parallel = ParallelConfig(**sizes)
    init_distributed(parallel, "cpu")
    trained: dict[Variant, Trained] = pickle.loads(Path(references).read_bytes())
    for variant in (VARIANTS[0], VARIANTS[3]):
        check_parity(sharded(engine, **settings), parallel, variant, trained[variant], Path(references).parent)
    shutdown_distributed()


@pytest.mark.matrix
@pytest.mark.parametrize(("sizes", "engine", "settings"), OPTIONS)
def test_options(sizes: dict[str, int], engine: str, settings: dict[str, Any], references: str, tmp_path: Path) -> None:
    run_ranks(train_with_option, world(sizes), tmp_path, args=(sizes, engine, settings, references), timeout=1200)


@pytest.mark.matrix
@pytest.mark.parametrize("sizes", [{"dp_replicate": 2, "dp_shard": 2}, {"dp_replicate": 2, "tp": 2, "sp": 2}])
def test_hybrid_sharding(sizes: dict[str, int], references: str, tmp_path: Path) -> None:
    runs = [("fsdp2", variant) for variant in VARIANTS]
    run_ranks(train_layouts, world(sizes), tmp_path, args=(sizes, runs, references), timeout=3000)
