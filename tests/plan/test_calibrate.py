"""Measuring this machine: that it works, and what becomes of the numbers. Not how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rae_scale.bench.collectives import Collected
from rae_scale.config import Config
from rae_scale.config.schema import ParallelConfig
from rae_scale.plan import calibrate as module
from rae_scale.plan.calibrate import TINY, Fit, Single, calibrate, summarise, with_latency
from rae_scale.plan.hardware import DEFAULT_RATES, GPUS, NETWORKS, Cluster, load_calibration
from rae_scale.plan.links import Span
from rae_scale.plan.step_time import plan_step

SINGLE = Single(matmul=500e12, attention=300e12, copy=3e12, launch=5e-6, to_host=20e9)
INSIDE = [Fit(kind, Span(8, 8), 300e9, 30e-6) for kind in module.COLLECTIVES]
CUDA = torch.device("cuda", 0)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")


@pytest.mark.dist
def test_two_ranks(two_ranks: tuple[Any, Path, dict[str, Any]]) -> None:
    """A machine without a data sheet becomes a GPU that can be planned for."""
    _, path, found = two_ranks
    assert found["kinds"] == [(kind, Span(2, 2)) for kind in module.COLLECTIVES]
    assert "all_to_all between 2 ranks, 2 to a node" in found["report"]
    calibration = load_calibration(path)
    assert calibration.gpu.name == "measured" and calibration.gpu.link > 0 and calibration.network is None
    assert calibration.rates.source == str(path)
    assert json.loads(path.read_text())["collectives"][0]["latency_s"] >= 0
    cluster = Cluster(calibration.gpu, NETWORKS["ethernet-100"], 2, 2)
    settings = Config.model_validate(
        {
            "model": {"name": "dit-tiny", "llm": {"name": "qwen2-tiny"}, "encoder": {"name": "siglip-demo"}},
            "engine": {"name": "fsdp2", "precision": "fp32"},
            "parallel": {"dp_shard": 2},
        }
    )
    assert 0 < plan_step(settings, cluster, calibration.rates).seconds < 1000


def test_latency_and_bandwidth_follow_from_two_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 us and 2 GB/s: of 4 ranks, an all-gather sends three quarters of the payload, an all-reduce twice as much."""
    shares = {"all_gather": 0.75, "all_reduce": 1.5}

    def time_collective(kind: Any, payload: int, *group_and_device: Any, **counts: int) -> Collected:
        return Collected(payload, [30e-6 + shares[kind] * payload / 2e9] * 3, 1)

    monkeypatch.setattr(module, "time_collective", time_collective)
    for kind in shares:
        found = module.fit(kind, None, Span(4, 4), torch.device("cpu"), module.ON_CPU)
        assert found == Fit(kind, Span(4, 4), pytest.approx(2e9), pytest.approx(30e-6))
    monkeypatch.setattr(module, "time_collective", lambda kind, payload, *rest, **counts: Collected(payload, [1e-3], 1))
    noise = module.fit("all_gather", None, Span(4, 4), torch.device("cpu"), module.ON_CPU)
    assert noise.bandwidth == pytest.approx(0.75 * module.ON_CPU.payloads[1] / 1e-3) and noise.latency >= 0


@pytest.mark.parametrize("started", [1, 2])
def test_it_joins_whatever_a_launcher_started(started: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves again, also if measuring fails."""
    seen: list[Any] = []
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(started), "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "init_distributed", lambda parallel, device: seen.append(parallel) or device)
    monkeypatch.setattr(module, "shutdown_distributed", lambda: seen.append("left"))
    monkeypatch.setattr(module, "measure_machine", lambda device, sizes: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate("cpu", TINY)
    assert seen == [ParallelConfig(dp_shard=started), "left"]


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    calibration, fits = calibrate("cpu", TINY)
    assert not fits and calibration.network is None
    gpu, rates = calibration.gpu, calibration.rates
    assert max(rates.matmul, rates.attention) == rates.memory == 1.0
    assert gpu.memory_bytes > 1e9 and gpu.host_link > 0 and 0 < rates.launch < 1e-2
    assert rates.hop == DEFAULT_RATES.hop


@pytest.mark.usefixtures("known")
def test_a_known_gpu_keeps_its_peaks() -> None:
    calibration = summarise(CUDA, SINGLE, INSIDE)
    assert calibration.gpu == GPUS["h100-80g"] and calibration.network is None
    rates = calibration.rates
    assert rates.matmul == pytest.approx(500 / 989.4) and rates.attention == pytest.approx(300 / 989.4)
    assert rates.memory == pytest.approx(3 / 3.35) and rates.link == pytest.approx(300 / 450)
    assert rates.launch == 5e-6


@pytest.mark.usefixtures("known")
def test_a_network_is_what_each_adapter_reached() -> None:
    """Two nodes of 8: 8 adapters side by side."""
    outside = [Fit(kind, Span(16, 8), 320e9, 80e-6) for kind in module.COLLECTIVES]
    calibration = summarise(CUDA, SINGLE, [*outside, *INSIDE])
    assert calibration.network is not None
    assert calibration.network.rate == 40e9 and calibration.rates.network == 1.0
    assert calibration.network.hop == 80e-6
    assert calibration.rates.link == pytest.approx(300 / 450)


def test_latency_becomes_a_start_and_hops() -> None:
    """Planned again, an all-gather takes what was measured."""
    found = with_latency(DEFAULT_RATES, INSIDE)
    assert found.base + 7 * found.hop == pytest.approx(30e-6)
    quick = with_latency(DEFAULT_RATES, [Fit("all_gather", Span(8, 8), 1e9, 2e-6)])
    assert (quick.base, quick.short_base, quick.hop, quick.short_hop) == (2e-6, 2e-6, 0.0, 0.0)
