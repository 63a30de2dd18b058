from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from tiny_world import TinyWorld

sys.path.insert(0, str(Path(__file__).parent))  # for what the ranks share with the tests

from faulty import RANK_1_FAULTS, RANK_1_FULL, WATCH_SPIKES
from ranks import two_ranks


@dataclass(frozen=True)
class Together:
    """What two replicas saw, rank by rank, and where they ran: <folder>/<name>."""

    folder: Path
    seen: list[dict[str, Any]]


@pytest.fixture(scope="session")
def together(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Together:
    """One-sided faults, drift and flipped bits. Starting ranks takes longer than all that they do."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "ranks").mkdir()
    replicas = {"parallel__dp_replicate": 2}
    faulty = [
        world.tree(folder / "fsdp2", engine__name="fsdp2", **WATCH_SPIKES, **replicas),
        world.tree(folder / "zero", engine__name="zero", engine__zero_stage=2, parallel__dp_shard=2, **WATCH_SPIKES),
    ]
    drift = {"engine__name": "fsdp2", "run__max_steps": 8, **replicas}
    drifting = [
        world.tree(folder / "checked", fault__replica_check_every=5, **drift),
        world.tree(folder / "saved", fault__replica_check_every=100, run__save_every=2, **drift),
        world.tree(folder / "unchecked", fault__replica_check_every=0, **drift),
    ]
    flipped = [("fsdp2", 3, {"dp_replicate": 2}), ("zero", 1, {"dp_shard": 2}), ("zero", 3, {"dp_shard": 2})]
    args = (faulty, RANK_1_FAULTS, RANK_1_FULL, drifting, 3, flipped)
    return Together(folder, run_ranks(two_ranks, 2, folder / "ranks", args=args, timeout=240))
