"""What this machine reaches: products, attention, memory, launches, and collectives between however many processes were
started. A calibration takes the place of the planner's defaults.

Products run in bf16 on a GPU and in float32 on a CPU. A GPU that the planner knows keeps its peaks, and rates are
fractions of them; for any other device what was measured is the peak.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from rae_scale import ops
from rae_scale.bench.collectives import COLLECTIVES, FLOAT32, Collective, time_collective
from rae_scale.bench.timing import copy_bandwidth, measure, seconds_waited, summary
from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel import init_distributed, shutdown_distributed
from rae_scale.parallel.ledger import sent
from rae_scale.parallel.ranks import resolve_ranks
from rae_scale.plan.hardware import GPU, GPUS, Calibration, Network, Rates
from rae_scale.plan.links import Span
from rae_scale.plan.work import FUSED_BACKWARD


@dataclass(frozen=True)
class Sizes:
    """What is measured. tokens, widths: products of [tokens, in] with [in, out] for neighbouring `widths`.
    payloads: bytes of the two collectives of each kind, of which the fit follows."""

    tokens: int
    widths: tuple[int, ...]
    images: int
    copy_gigabytes: float
    payloads: tuple[int, int]
    repeats: int


# Of the DiT 2.4B and Qwen2.5 1.5B with a micro-batch of 32.
ON_GPU = Sizes(8192, (2048, 6144, 2048, 11008, 2048, 12288, 1536, 8960, 1536), 32, 2.0, (1 << 18, 1 << 28), 20)
ON_CPU = Sizes(256, (512, 1536, 512, 2816, 512), 2, 0.1, (1 << 14, 1 << 24), 5)
TINY = Sizes(16, (32, 96, 32), 1, 0.001, (1 << 10, 1 << 14), 2)
"""Shows only that it works."""


@dataclass(frozen=True)
class Fit:
    """Of one kind of collective in one group: seconds = latency + bytes that a rank sends / bandwidth."""

    kind: Collective
    span: Span
    bandwidth: float
    latency: float


def calibrate(device: str = "auto", sizes: Sizes | None = None) -> tuple[Calibration, list[Fit]]:
    """Measure this machine, or with the other processes that a launcher started, their machines. Collective.

    device: auto, cpu or cuda. sizes: None is what suits the device.

    Raises:
        ValueError: the launcher's variables contradict each other, or there is no such device.
    """
    world_size = resolve_ranks(os.environ, configured=2).world_size
    torch_device = init_distributed(ParallelConfig(dp_shard=world_size), device)
    try:
        return measure_machine(torch_device, sizes or (ON_GPU if torch_device.type == "cuda" else ON_CPU))
    finally:
        shutdown_distributed()


def measure_machine(device: torch.device, sizes: Sizes) -> tuple[Calibration, list[Fit]]:
    """`calibrate` among processes that have found each other already. Collective."""
    fits = collective_fits(device, sizes) if dist.is_initialized() else []
    return summarise(device, single_rates(device, sizes), fits), fits


@dataclass(frozen=True)
class Single:
    """Of one process: FLOP/s, FLOP/s, bytes/s, seconds per launch, bytes/s to the host."""

    matmul: float
    attention: float
    copy: float
    launch: float
    to_host: float


def single_rates(device: torch.device, sizes: Sizes) -> Single:
    return Single(
        matmul=product_rate(device, sizes),
        attention=attention_rate(device, sizes),
        copy=copy_bandwidth(device, sizes.copy_gigabytes),
        launch=launch_seconds(device, sizes),
        to_host=host_bandwidth(device, sizes),
    )


def product_rate(device: torch.device, sizes: Sizes) -> float:
    """FLOP/s over all shapes together: the sum of FLOPs over the sum of times."""
    dtype = product_dtype(device)
    flops = seconds = 0.0
    for width_in, width_out in pairwise(sizes.widths):
        x = torch.randn(sizes.tokens, width_in, device=device, dtype=dtype)
        weight = torch.randn(width_in, width_out, device=device, dtype=dtype)
        out = torch.empty(sizes.tokens, width_out, device=device, dtype=dtype)
        work = [lambda x=x, weight=weight, out=out: torch.mm(x, weight, out=out)]
        seconds += measure(work, device, repeats=sizes.repeats, warm_up=2).median
        flops += 2.0 * sizes.tokens * width_in * width_out
    return flops / seconds


def attention_rate(device: torch.device, sizes: Sizes) -> float:
    """FLOP/s of fused attention, forward and backward, on images of 256 tokens and heads of 64 channels."""
    tokens, head_dim = 256, 64
    heads = max(1, sizes.widths[0] // head_dim)
    shape = sizes.images, tokens, heads, head_dim
    q, k, v = (torch.randn(shape, device=device, dtype=product_dtype(device), requires_grad=True) for _ in range(3))
    gradient = torch.randn_like(q)

    def step() -> None:
        torch.autograd.grad(ops.attention(q, k, v), (q, k, v), gradient)

    seconds = measure([step], device, repeats=sizes.repeats, warm_up=2).median
    return (1 + FUSED_BACKWARD) * 4.0 * sizes.images * tokens**2 * heads * head_dim / seconds


def launch_seconds(device: torch.device, sizes: Sizes) -> float:
    """Of an operation too small to take time itself, through autograd, forward and backward."""
    count = 10 * sizes.repeats
    x = torch.ones(8, device=device, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(count):
            y = y * 1.0
        torch.autograd.grad(y.sum(), x)

    return summary(seconds_waited([chain], device, repeats=3, warm_up=1)).median / (2 * count)


def host_bandwidth(device: torch.device, sizes: Sizes) -> float:
    """Bytes/s of a copy to page-locked host memory, as a checkpoint's."""
    count = max(1, int(sizes.copy_gigabytes * 1e8) // FLOAT32)
    source, target = torch.ones(count, device=device), torch.empty(count, pin_memory=device.type == "cuda")
    work = [lambda: target.copy_(source, non_blocking=True)]
    return count * FLOAT32 / summary(seconds_waited(work, device, repeats=sizes.repeats, warm_up=1)).median


def product_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def collective_fits(device: torch.device, sizes: Sizes) -> list[Fit]:
    """Of every kind, between the processes of this node, and between all if there are more nodes. Collective."""
    world = dist.get_world_size()
    hosts: list[Any] = [None] * world
    dist.all_gather_object(hosts, socket.gethostname())
    nodes = [[rank for rank in range(world) if hosts[rank] == host] for host in dict.fromkeys(hosts)]
    local = min(map(len, nodes))
    groups: list[tuple[dist.ProcessGroup, Span]] = []
    if len(nodes) > 1:
        groups.append((dist.group.WORLD, Span(world, local)))
    if local > 1:
        own, _ = dist.new_subgroups_by_enumeration(nodes)
        groups.append((own, Span(len(next(node for node in nodes if dist.get_rank() in node)), local)))
    return [fit(kind, group, span, device, sizes) for group, span in groups for kind in COLLECTIVES]


def fit(kind: Collective, group: dist.ProcessGroup, span: Span, device: torch.device, sizes: Sizes) -> Fit:
    """By a short and a long message."""
    timings = [
        time_collective(kind, payload, group, device, repeats=sizes.repeats, warm_up=2) for payload in sizes.payloads
    ]
    short, long = (summary(timing.seconds).median for timing in timings)
    wires = [sent(kind, timing.payload, span.ranks) for timing in timings]
    # Noise may make the short one the slower one, where both are short.
    bandwidth = (wires[1] - wires[0]) / (long - short) if long > short else wires[1] / long
    return Fit(kind, span, bandwidth, max(0.0, short - wires[0] / bandwidth))


def summarise(device: torch.device, single: Single, fits: Sequence[Fit]) -> Calibration:
    """Rates as fractions of the peaks of a known GPU, or of what was measured."""
    inside = [fit for fit in fits if not fit.span.crosses]
    outside = [fit for fit in fits if fit.span.crosses]
    gpu = known_gpu(device) or measured_gpu(device, single, inside)
    rates = Rates(
        matmul=fraction(single.matmul, gpu.flops),
        attention=fraction(single.attention, gpu.flops),
        memory=fraction(single.copy, gpu.bandwidth),
        launch=single.launch,
        source="measured",
    )
    if inside:
        # The rings' slowest kind: steps are made of all of them.
        rates = with_latency(replace(rates, link=fraction(slowest(inside), gpu.link)), inside)
    if not outside:
        return Calibration(gpu, None, rates)
    # A rate of the adapter as it was reached: its own peak is not known here.
    local = outside[0].span.local
    hop = max(each.latency for each in outside) / max(1, outside[0].span.nodes - 1)
    network = Network("measured", slowest(outside) / local, hop=hop, short_hop=hop)
    return Calibration(gpu, network, replace(rates, network=1.0))


def slowest(fits: Sequence[Fit]) -> float:
    return min(fit.bandwidth for fit in fits if fit.kind != "all_to_all")


def with_latency(rates: Rates, fits: Sequence[Fit]) -> Rates:
    """The latency of an all-gather, which is a start and a hop to each other rank, with the default start if it is
    shorter than what was measured."""
    (gather,) = (fit for fit in fits if fit.kind == "all_gather")
    base = min(rates.base, gather.latency)
    hop = (gather.latency - base) / (gather.span.ranks - 1)
    return replace(
        rates, base=base, hop=hop, short_base=min(rates.short_base, base), short_hop=min(rates.short_hop, hop)
    )


def fraction(measured: float, peak: float) -> float:
    """Above its peak only where a cache or a boosted clock helped."""
    return min(1.0, measured / peak)


def known_gpu(device: torch.device) -> GPU | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu for gpu in GPUS.values() if gpu.device == name), None)


def measured_gpu(device: torch.device, single: Single, inside: Sequence[Fit]) -> GPU:
    """A device without a data sheet: what was measured counts as its peak."""
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    else:
        name, memory = platform.processor() or platform.machine(), host_memory()
    return GPU(
        name="measured",
        device=name,
        memory_bytes=memory,
        flops=max(single.matmul, single.attention),
        bandwidth=single.copy,
        link=slowest(inside) if inside else single.copy,
        host_link=single.to_host,
        node_gpus=inside[0].span.local if inside else 1,
    )


def host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def report(calibration: Calibration, fits: Sequence[Fit]) -> str:
    """What was measured, in lines of text."""
    gpu, rates = calibration.gpu, calibration.rates
    lines = [
        f"{gpu.device}: products {rates.matmul * gpu.flops / 1e12:.3g} TFLOP/s ({rates.matmul:.0%} of the peak), "
        f"attention {rates.attention * gpu.flops / 1e12:.3g} TFLOP/s, memory {rates.memory * gpu.bandwidth / 1e9:,.1f} "
        f"GB/s ({rates.memory:.0%}), launch {rates.launch * 1e6:.1f} us"
    ]
    for each in fits:
        lines.append(
            f"{each.kind} between {each.span.ranks} ranks, {each.span.local} to a node: each sends "
            f"{each.bandwidth / 1e9:.2f} GB/s, latency {each.latency * 1e6:.0f} us"
        )
    return "\n".join(lines)


def content(calibration: Calibration, fits: Sequence[Fit], environment: dict[str, Any]) -> dict[str, Any]:
    """What goes into the file: the calibration, what it follows from, and where it was measured."""
    return {
        **calibration.to_json(),
        "collectives": [
            {"kind": each.kind, "ranks": each.span.ranks, "local": each.span.local}
            | {"bytes_per_s": each.bandwidth, "latency_s": each.latency}
            for each in fits
        ],
        "environment": environment,
    }
