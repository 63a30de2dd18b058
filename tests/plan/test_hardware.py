"""Hardware by name, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rae_scale.models.flops import PEAK_BF16_FLOPS
from rae_scale.plan.hardware import (
    GPUS,
    NETWORKS,
    Calibration,
    Cluster,
    Rates,
    find_cluster,
    load_calibration,
)


def test_every_gpu_with_a_peak_can_be_planned_for() -> None:
    assert {gpu.device: gpu.flops for gpu in GPUS.values()} == PEAK_BF16_FLOPS


def test_usual_nodes() -> None:
    """Memory is below the data sheet's; cards without NVLink share an adapter."""
    hopper = find_cluster("h100-80g", 64)
    assert (hopper.nodes, hopper.gpus_per_node, hopper.network.name) == (8, 8, "ib-ndr-400")
    assert hopper.network_rate == 50e9
    assert hopper.gpu.has_nvlink and hopper.gpu.memory_bytes < 80 * 2**30
    cards = find_cluster("h100-pcie", 4)
    assert (cards.nodes, cards.gpus_per_node, cards.network.name) == (1, 4, "shared-400")
    assert not cards.gpu.has_nvlink
    assert find_cluster("a100-80g", 16).network_rate == 25e9


def test_a_shared_adapter_is_divided() -> None:
    assert find_cluster("h200", 64, "shared-400").network_rate == 50e9 / 8
    assert find_cluster("h200", 64, "shared-400", gpus_per_node=2).network_rate == 50e9 / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h300", 8), "'h300' is no GPU that the planner knows; choose one of a100-40g"),
        (("h200", 8, "token-ring"), "'token-ring' is no network"),
        (("h200", 12), "12 GPUs do not fill nodes of 8; choose a multiple of 8"),
        (("h200", 0), "both must be at least 1"),
    ],
)
def test_what_there_is_not(arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_cluster(*arguments)


def test_rates_are_fractions() -> None:
    with pytest.raises(ValueError, match=r"rates.matmul=1.2 is no fraction"):
        Rates(matmul=1.2)


def test_a_calibration_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    for network in (None, NETWORKS["ethernet-100"]):
        written = Calibration(GPUS["h200"], network, Rates(matmul=0.7, source=str(path)))
        path.write_text(json.dumps(written.to_json()))
        assert load_calibration(path) == written
        assert Cluster(written.gpu, written.network or NETWORKS["ib-ndr-400"], 8, 8).gpu.flops == 989.4e12


@pytest.mark.parametrize("content", ["", "[]", '{"gpu": {}}', '{"gpu": {}, "network": null, "rates": {"speed": 1}}'])
def test_what_is_no_calibration(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"holds no calibration .*; write one with"):
        load_calibration(path)
    with pytest.raises(ValueError, match="holds no calibration"):
        load_calibration(tmp_path / "missing.json")
