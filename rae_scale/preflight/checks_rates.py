"""Judgement on what was measured: against the other ranks, and against what the planner expects of the hardware."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from rae_scale.plan.hardware import DEFAULT_RATES, GPU, GPUS, NETWORKS, Cluster, named, usual_network
from rae_scale.plan.links import Span, collective_seconds, link_name
from rae_scale.preflight.finding import Finding, Status
from rae_scale.preflight.measure import Computed, Reduced

GB, TERA = 1e9, 1e12
SLOW_RANK = 0.85
"""Of the median rate."""
LOW, VERY_LOW = 0.7, 0.5
"""Of the expected rate."""


def judge_compute(computed: Mapping[int, Computed]) -> Iterator[Finding]:
    """By rank. On a CPU ranks share cores, and a slow one is no defect."""
    median = statistics.median(each.flops for each in computed.values())
    slow = {rank for rank, each in computed.items() if each.flops < SLOW_RANK * median}
    for rank in sorted(slow):
        each = computed[rank]
        reasons = f" ({', '.join(each.slowdowns)})" if each.slowdowns else ""
        yield Finding(
            "compute",
            "warn" if each.device == "cpu" else "fail",
            f"{each.flops / TERA:.3g} TFLOP/s{reasons}, the median is {median / TERA:.3g}",
            "every step waits for this rank",
            "see what else runs there and how it is cooled, or leave the machine out",
            (rank,),
        )
    gpu = known_gpu(next(iter(computed.values())).device)
    expected = None if gpu is None else gpu.flops * DEFAULT_RATES.matmul
    others = tuple(rank for rank in computed if rank not in slow)
    if expected is not None and median < LOW * expected:
        yield Finding(
            "compute",
            "warn",
            f"{median / TERA:.3g} TFLOP/s, where {expected / TERA:.3g} are usual",
            "the run takes longer than planned",
            "see power caps and clocks (nvidia-smi -q -d POWER,CLOCK)",
            others,
        )
    elif others:
        yield Finding("compute", "ok", f"{median / TERA:.3g} TFLOP/s, the median", ranks=others)


def judge_bandwidth(
    reduced: Reduced, device: str, machines: Sequence[Sequence[int]], network: str | None
) -> tuple[Finding, bool]:
    """The finding, and whether it is worth finding out which pair is slow.

    device: of the ranks, "cpu" or a GPU's name. network: what the user says joins machines; None is what is usual.
    """
    ranks = tuple(rank for machine in machines for rank in machine)
    value = f"all-reduce of {reduced.payload / GB:.3f} GB: {reduced.bus / GB:.2f} GB/s on each rank's link"
    gpu = known_gpu(device)
    if gpu is None:
        text = "on the CPU" if device == "cpu" else f"{device} is not known to the planner"
        return Finding("bandwidth", "ok", f"{value} ({text}: held against nothing)", ranks=ranks), False
    span = Span(len(ranks), min(len(machine) for machine in machines))
    joined = named("network", network or usual_network(gpu), NETWORKS)
    # Ranks that do not fill their machines are as many as `span` says, whatever the machine could hold.
    cluster = Cluster(gpu, joined, span.local * span.nodes, span.local)
    expected = collective_seconds("all_reduce", reduced.payload, 1, span, cluster, DEFAULT_RATES)
    share = expected / reduced.seconds
    value += f", {share:.0%} of what {link_name(span, cluster)} should reach"
    if share >= LOW:
        return Finding("bandwidth", "ok", value, ranks=ranks), False
    certain = network is not None or not span.crosses
    fix = "see NCCL_DEBUG=INFO for the transport: NET/IB between machines, P2P inside; NCCL_SOCKET_IFNAME, NCCL_IB_HCA"
    if not certain:
        fix += f"; if this is no {joined.name}, say which it is by --network"
    status: Status = "fail" if certain and share < VERY_LOW else "warn"
    why = "gradients and gathered weights take longer than planned"
    return Finding("bandwidth", status, value, why, fix, ranks), True


def known_gpu(device: str) -> GPU | None:
    return next((gpu for gpu in GPUS.values() if gpu.device == device), None)
