"""Judgement on rates, on made-up measurements."""

from __future__ import annotations

from rae_scale.plan.hardware import DEFAULT_RATES, GPUS
from rae_scale.preflight.checks_rates import judge_bandwidth, judge_compute
from rae_scale.preflight.measure import Computed, Reduced
from tests.preflight.made_up import ROSTER, bad, only

H100 = GPUS["h100-80g"]
USUAL = DEFAULT_RATES.matmul * H100.flops


def computed(*shares: float, device: str = H100.device, slowdowns: tuple[str, ...] = ()) -> dict[int, Computed]:
    return {rank: Computed(device, share * USUAL, slowdowns) for rank, share in enumerate(shares)}


def test_equal_ranks() -> None:
    assert not bad(judge_compute(computed(1.0, 0.98, 1.01, 0.9)))


def test_a_slow_gpu_is_named() -> None:
    finding = only(judge_compute(computed(1.0, 0.98, 0.8, 1.01)))
    assert (finding.check, finding.status, finding.ranks) == ("compute", "fail", (2,))
    assert only(judge_compute(computed(1, 1, 0.5, slowdowns=("too hot (hardware)",)))).value.count("too hot") == 1


def test_a_slow_cpu_is_no_defect() -> None:
    assert only(judge_compute(computed(1.0, 0.98, 0.8, 1.01, device="cpu"))).status == "warn"


def test_all_slow_alike() -> None:
    finding = only(judge_compute(computed(0.5, 0.5, 0.5)))
    assert (finding.check, finding.status, finding.ranks) == ("compute", "warn", (0, 1, 2))
    assert not bad(judge_compute(computed(0.01, 0.01, device="cpu")))


def reduced(bus: float) -> Reduced:
    """Of 256 MB over four ranks."""
    payload = 1 << 28
    return Reduced(payload, 1.5 * payload / bus, bus)


def test_on_a_cpu_and_an_unknown_gpu_it_is_only_told() -> None:
    for device in ("cpu", "NVIDIA of tomorrow"):
        finding, slow = judge_bandwidth(reduced(1e6), device, ROSTER.machines, None)
        assert (finding.status, slow) == ("ok", False)


def test_a_network_that_is_as_fast_as_it_should_be() -> None:
    # Two adapters of 50 GB/s to a node, at 90 %.
    finding, slow = judge_bandwidth(reduced(80e9), H100.device, ROSTER.machines, None)
    assert (finding.status, slow) == ("ok", False)


def test_a_slow_network_is_worth_a_closer_look() -> None:
    finding, slow = judge_bandwidth(reduced(5e9), H100.device, ROSTER.machines, None)
    assert (finding.check, finding.status, slow) == ("bandwidth", "warn", True)
    assert "--network" in finding.fix
    finding, slow = judge_bandwidth(reduced(5e9), H100.device, ROSTER.machines, "ib-ndr-400")
    assert (finding.status, slow) == ("fail", True)


def test_a_slow_network_that_is_known_to_be_slow() -> None:
    finding, _ = judge_bandwidth(reduced(17e9), H100.device, ROSTER.machines, "ethernet-100")
    assert finding.status == "ok"


def test_inside_a_machine_the_links_are_known() -> None:
    finding, _ = judge_bandwidth(reduced(20e9), H100.device, [[0, 1, 2, 3]], None)
    assert finding.status == "fail"
    assert "NVLink" in finding.value
