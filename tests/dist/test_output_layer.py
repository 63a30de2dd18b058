"""The language model's output layer in chunks of rows, as many on each rank as it has labels: nobody waits for anyone,
and training is what it is with all logits at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from awkward import VOCAB
from harness import run_ranks
from parity import Trained, Variant, check_parity, micro_batches, sharded, train_alone

from rae_scale.config.schema import ParallelConfig
from rae_scale.models.packing import TextLayout
from rae_scale.parallel import Mesh, init_distributed, shutdown_distributed

pytestmark = pytest.mark.dist

CHUNK = 7  # rows
STEPS = 5


def labels_of_ranks(step: int) -> list[int]:
    meshes = [Mesh(torch.device("cpu"), dp_shard=2, rank=rank) for rank in range(2)]
    batches = [next(micro_batches(mesh, 1, step))[0] for mesh in meshes]
    return [len(TextLayout.of(batch.attention_mask, batch.labels).labelled) for batch in batches]


def test_ranks_have_different_numbers_of_chunks() -> None:
    chunks = [[-(-labels // CHUNK) for labels in labels_of_ranks(step)] for step in range(STEPS)]
    assert sum(first != second for first, second in chunks) >= 2 and max(map(max, chunks)) > 3
    assert [0, 0] in chunks


def two_ranks(reference: Trained, folder: str) -> None:
    init_distributed(ParallelConfig(dp_shard=2), "cpu")
    # The package has the function under this name.
    sys.modules["rae_kernels.linear_cross_entropy"].LOGITS_BYTES = CHUNK * VOCAB * 4
    for name, parallel in (
        ("zero3", ParallelConfig(dp_shard=2)),
        ("fsdp2", ParallelConfig(dp_shard=2)),
        ("fsdp2", ParallelConfig(tp=2)),
        ("zero3", ParallelConfig(sp=2)),
    ):
        check_parity(sharded(name), parallel, Variant(), reference, Path(folder), micro_steps=1)
    shutdown_distributed()


def test_two_ranks(tmp_path: Path) -> None:
    reference = train_alone(Variant(), tmp_path, STEPS)
    run_ranks(two_ranks, 2, tmp_path, args=(reference, str(tmp_path)))
