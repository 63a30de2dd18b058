"""What ranks reach together: each one's products at the same time, an all-reduce over all, and exchanges of pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from rae_scale.bench.collectives import time_collective
from rae_scale.bench.timing import summary, synchronize
from rae_scale.parallel.ledger import sent
from rae_scale.plan.calibrate import ON_CPU, ON_GPU, product_dtype, product_rate
from rae_scale.preflight.gpu import slowdowns

T = TypeVar("T")

MIB = 1 << 20
HEAT_SECONDS, HEAT_WIDTH, HEAT_QUEUE = 3.0, 8192, 100
"""A GPU with a cooling or power problem is fast at first."""
REDUCE_BYTES = {"cuda": 256 * MIB, "cpu": MIB}
PAIR_BYTES = {"cuda": 64 * MIB, "cpu": MIB // 4}
PAIR_REPEATS = 3


@dataclass(frozen=True)
class Computed:
    """flops: FLOP/s of matrix products, bf16 on a GPU, float32 elsewhere. slowdowns: of the clock, under load."""

    device: str
    flops: float
    slowdowns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reduced:
    """seconds: of an all-reduce of `payload` bytes over all ranks. bus: bytes/s that each rank sends meanwhile."""

    payload: int
    seconds: float
    bus: float


def compute(device: torch.device) -> Computed:
    """Collective, so that all ranks of a machine heat it, and draw its power, at once."""
    if device.type != "cuda":
        start_together()
        return Computed("cpu", product_rate(device, ON_CPU))
    start_together()
    held_down = heat(device, HEAT_WIDTH, HEAT_SECONDS, lambda: slowdowns(device))
    return Computed(torch.cuda.get_device_name(device), product_rate(device, ON_GPU), held_down)


def heat(device: torch.device, width: int, seconds: float, look: Callable[[], T]) -> T:
    """Multiply [width, width] matrices without a pause for so long. Returns what `look` sees meanwhile, at the end."""
    x = torch.randn(width, width, device=device, dtype=product_dtype(device))
    out = torch.empty_like(x)
    until = time.monotonic() + seconds
    while True:
        for _ in range(HEAT_QUEUE):
            torch.mm(x, x, out=out)
        if time.monotonic() > until:
            break
        synchronize(device)
    found = look()
    synchronize(device)
    return found


def start_together() -> None:
    if dist.is_initialized():
        dist.barrier()


def reduce(device: torch.device) -> Reduced:
    """Collective."""
    world = dist.group.WORLD
    assert world is not None
    collected = time_collective("all_reduce", REDUCE_BYTES[device.type], world, device, repeats=10, warm_up=3)
    seconds = summary(collected.seconds).median
    return Reduced(collected.payload, seconds, sent("all_reduce", collected.payload, world.size()) / seconds)


def exchange_pairs(device: torch.device, rounds: Sequence[Sequence[tuple[int, int]]]) -> dict[str, float]:
    """Bytes/s in each direction of every pair that this rank is the first of, as "first-second". Collective.

    rounds: pairs that exchange at the same time; a rank is in no more than one pair of a round.
    """
    rank = dist.get_rank()
    payload = PAIR_BYTES[device.type]
    outgoing, incoming = (torch.zeros(payload, dtype=torch.uint8, device=device) for _ in range(2))
    rates = {}
    for pairs in rounds:
        dist.barrier()
        for first, second in pairs:
            if rank in (first, second):
                seconds = exchange(outgoing, incoming, second if rank == first else first, device)
                if rank == first:
                    rates[f"{first}-{second}"] = payload / seconds
    return rates


def exchange(outgoing: torch.Tensor, incoming: torch.Tensor, other: int, device: torch.device) -> float:
    """Seconds of the fastest of a few exchanges. The first one connects and does not count."""
    times = []
    for _ in range(1 + PAIR_REPEATS):
        synchronize(device)
        started = time.perf_counter()
        operations = [dist.P2POp(dist.isend, outgoing, other), dist.P2POp(dist.irecv, incoming, other)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
