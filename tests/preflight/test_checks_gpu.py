"""Judgement on GPUs, on made-up facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rae_scale.preflight.checks_gpu import check_gpus
from rae_scale.preflight.facts import Facts
from rae_scale.preflight.gpu import slowdown_names
from tests.preflight.made_up import GPU, NEEDS, bad, cluster, facts, only


def with_gpu(**changes: Any) -> list[Facts]:
    """A cluster whose rank 3 has another GPU."""
    return cluster(facts(3, gpu=replace(GPU, **changes)))


def test_a_cluster_in_order() -> None:
    assert not bad(check_gpus(cluster(), NEEDS, "auto"))


@pytest.mark.parametrize(
    ("changes", "check", "status", "word"),
    [
        ({"ecc_errors": 2.0}, "gpu-health", "fail", "2 uncorrected ECC errors"),
        ({"rows_failed": True}, "gpu-health", "fail", "row remapping"),
        ({"rows_pending": True}, "gpu-health", "warn", "waits for a reset"),
        ({"slowdowns": ("too hot (hardware)",)}, "gpu-health", "fail", "too hot (hardware)"),
        ({"temperature": 91.0}, "gpu-health", "warn", "91 degrees"),
        ({"power_limit": 400.0}, "gpu-health", "warn", "400 of 700 W"),
        ({"pcie_width": 8.0}, "gpu-health", "warn", "8 of 16 lanes"),
        ({"allocatable": 50 * 10**9}, "gpu-memory", "fail", "50.0 GB of 80.0 GB can be allocated; the plan needs 60.0"),
        ({"memory_free": 70 * 10**9, "others": ("pid 7 (9000 MiB)",)}, "gpu-memory", "warn", "pid 7"),
        ({"name": "NVIDIA A100-SXM4-80GB"}, "gpu-model", "warn", "most ranks: NVIDIA H100"),
    ],
)
def test_one_thing_is_wrong(changes: dict[str, Any], check: str, status: str, word: str) -> None:
    finding = only(check_gpus(with_gpu(**changes), NEEDS, "auto"))
    assert (finding.check, finding.status, finding.ranks) == (check, status, (3,))
    assert word in finding.value


def test_what_a_driver_does_not_tell_is_no_complaint() -> None:
    unknown = dict.fromkeys(("temperature", "power_limit", "power_default", "ecc_errors", "pcie_width"), None)
    assert not bad(check_gpus(with_gpu(**unknown), NEEDS, "auto"))


def test_memory_that_others_hold_is_blamed_on_them() -> None:
    held = with_gpu(allocatable=10**10, memory_free=11 * 10**9, others=("pid 7 (69000 MiB)",))
    finding = only(check_gpus(held, NEEDS, "auto"))
    assert finding.status == "fail"
    assert "69.0 GB are in use by pid 7" in finding.why


def test_the_context_of_this_process_is_in_the_plan() -> None:
    assert not bad(check_gpus(with_gpu(allocatable=NEEDS.gpu - 10**8), NEEDS, "auto"))


def test_no_gpu_is_a_failure_only_where_one_is_asked_for() -> None:
    every = [facts(rank, gpu=None, gpus=0) for rank in range(4)]
    assert not bad(check_gpus(every, NEEDS, "auto"))
    assert {finding.check for finding in bad(check_gpus(every, NEEDS, "cuda"))} == {"gpu"}


def test_ranks_with_and_without_a_gpu_do_not_mix() -> None:
    findings = bad(check_gpus(cluster(facts(2, gpu=None, gpu_problem="driver too old")), NEEDS, "auto"))
    assert [(finding.check, finding.status, finding.ranks) for finding in findings] == [
        ("gpu", "fail", (2,)),
        ("gpu-model", "fail", (2,)),
    ]


def test_reasons_for_a_slow_clock() -> None:
    # nvml.h: idle and the GPU's own power cap are ordinary.
    assert slowdown_names("0x0000000000000005") == ()
    assert slowdown_names("0x00000000000000C8") == (
        "hardware slowdown",
        "too hot (hardware)",
        "power brake of the machine",
    )
    assert slowdown_names("[N/A]") == ()
