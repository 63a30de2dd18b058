"""Sizes of checkpoints, intervals between them, and what failures cost."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch

from rae_scale.config import Config
from rae_scale.engines import build_engine
from rae_scale.models.composite import build_scale_rae, group_of
from rae_scale.parallel import Mesh
from rae_scale.plan.duration import (
    LLAMA_3_GPU_HOURS,
    Reliability,
    checkpoint_size,
    daly_interval,
    lost_fraction,
    plan_duration,
    young_interval,
)
from rae_scale.plan.hardware import find_cluster
from rae_scale.state import save_checkpoint


def config(*, train: bool = True, ema: float | None = 0.9, buffer: float = 16.0, **parallel: int) -> Config:
    return Config.model_validate(
        {
            "model": {"name": "dit-tiny", "llm": {"name": "qwen2-tiny", "train": train}},
            "optim": {"ema_decay": ema},
            "engine": {"name": "eager" if not parallel else "fsdp2", "precision": "fp32"},
            "parallel": parallel,
            "run": {"max_steps": 1000, "save_every": 100, "save_buffer_gb": buffer},
        }
    )


def bytes_in(folder: Path) -> Counter[str]:
    """Bytes of the tensors in a checkpoint's files by their kind, from the files' own headers."""
    found: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for key, entry in header.items():
            if key != "__metadata__":
                first, last = entry["data_offsets"]
                found[key.partition("/")[0]] += last - first
    return found


@pytest.mark.parametrize(("train", "ema"), [(True, 0.9), (False, 0.9), (True, None)])
def test_a_checkpoint_is_as_large_as_a_real_one(train: bool, ema: float | None, tmp_path: Path) -> None:
    """Frozen weights are in it, too, but no moments of them."""
    settings, mesh = config(train=train, ema=ema), Mesh(torch.device("cpu"))
    module = build_scale_rae(settings.model, 16, 16, None)
    engine = build_engine(settings.engine, settings.optim, module, group_of, mesh)
    found = bytes_in(save_checkpoint(tmp_path, 1, engine, mesh, {}, keep_last=1))
    size = checkpoint_size(settings)
    assert found.pop("weight") == size.weights
    assert found.pop("ema", 0) == size.ema
    assert sum(found.values()) == size.moments > 0
    assert size.total == size.weights + size.moments + size.ema


def test_intervals() -> None:
    """Young's formula, and Daly's, which is his for rare failures and never better than it to the expected loss."""
    assert young_interval(10.0, 3 * 3600) == pytest.approx(464.758, abs=1e-3)
    assert daly_interval(1.0, 1e8) == pytest.approx(young_interval(1.0, 1e8), rel=1e-3)
    # 0.5 = C / 2 M: 2 sqrt(1 / 2) (1 + sqrt(1 / 2) / 3 + 1 / 18) - 1
    assert daly_interval(1.0, 1.0) == pytest.approx(math.sqrt(2) * (1 + math.sqrt(0.5) / 3 + 0.5 / 9) - 1)
    assert daly_interval(5.0, 2.0) == 2.0
    for cost, mtbf in ((10.0, 1e4), (1.0, 1e6)):
        best = lost_fraction(young_interval(cost, mtbf), cost, 0.0, 0.0, mtbf)
        for factor in (0.5, 0.9, 1.1, 2.0):
            assert lost_fraction(factor * young_interval(cost, mtbf), cost, 0.0, 0.0, mtbf) > best


def test_failures_are_those_of_llama_3() -> None:
    """16,384 GPUs for 54 days."""
    settings = config(dp_replicate=2048, dp_shard=8)
    found = plan_duration(settings, find_cluster("h100-80g", 16_384), step_seconds=54 * 86_400 / 1000)
    assert found.failures == pytest.approx(419)
    assert found.mtbf == pytest.approx(LLAMA_3_GPU_HOURS * 3600 / 16_384)
    assert found.mtbf / 3600 == pytest.approx(3.09, abs=0.01)


def test_a_run() -> None:
    settings = config(dp_shard=8)
    reliability = Reliability(gpu_hours=800.0, restart=100.0, storage=1e6)
    cluster = find_cluster("h200", 8)
    found = plan_duration(settings, cluster, 2.0, reliability)
    size = checkpoint_size(settings)
    assert (found.steps, found.training, found.gpu_hours) == (1000, 2000.0, 2000.0 * 8 / 3600)
    assert found.per_rank == size.total / 8
    assert found.write == size.total / 1e6
    assert found.stall == pytest.approx(size.total / 8 / (64e9 * 0.8))
    assert found.mtbf == 100 * 3600
    assert found.interval == 200.0
    lost = found.stall / 200 + (100 + found.write + 100 + found.write) / found.mtbf
    assert found.lost == pytest.approx(lost)
    assert found.expected == pytest.approx(2000.0 / (1 - lost))
    # No save begins before the last one is on disk.
    assert found.daly == found.young == found.write > young_interval(found.stall, found.mtbf)
    assert found.lost_best < found.lost


def test_what_does_not_fit_into_the_buffer_holds_training_up() -> None:
    cluster = find_cluster("h200", 8)
    whole = plan_duration(config(dp_shard=8, buffer=0.0), cluster, 1.0)
    assert whole.stall == pytest.approx(whole.write)
    size = whole.per_rank
    half = plan_duration(config(dp_shard=8, buffer=size / 2 / 1e9), cluster, 1.0)
    assert half.stall == pytest.approx(half.write / 2 + size / 2 / (64e9 * 0.8))


def test_a_cluster_that_never_gets_anywhere() -> None:
    found = plan_duration(config(dp_shard=8), find_cluster("h200", 8), 1e6, Reliability(gpu_hours=1.0))
    assert found.lost == 1.0 and found.expected == math.inf
    with pytest.raises(ValueError, match="are positive"):
        Reliability(storage=0.0)
