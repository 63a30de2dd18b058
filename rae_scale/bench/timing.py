"""Times of work on a device, and the two rates that they are held against."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor

Work = Callable[[], object]

HEAD_START_CYCLES = 4_000_000
"""The GPU sleeps so long (about 2 ms) before a timed region, in which the host puts the whole region into its queue:
otherwise a short region's time would be the host's, who issues it."""


class Timing(NamedTuple):
    """Seconds over all repeats: median, and the first and the ninth decile as spread."""

    median: float
    low: float
    high: float

    def milliseconds(self) -> dict[str, float]:
        return {name: 1e3 * value for name, value in self._asdict().items()}


def summary(seconds: Sequence[float]) -> Timing:
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0])
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return Timing(statistics.median(seconds), deciles[0], deciles[-1])


def measure(work: Sequence[Work], device: torch.device, *, repeats: int = 30, warm_up: int = 5) -> Timing:
    """Time of one call. work: the same on different inputs, called in turn, so that no input is found in the cache."""
    return summary(seconds_of(work, device, repeats=repeats, warm_up=warm_up))


def seconds_of(
    work: Sequence[Work], device: torch.device, *, repeats: int, warm_up: int, before: Work = lambda: None
) -> list[float]:
    """Each call's time on the device, as `measure` takes it. before: called, untimed, ahead of every timed call."""
    turns = cycle(work)
    for each in islice(turns, max(warm_up, len(work))):
        each()
    synchronize(device)
    timed = time_on_gpu if device.type == "cuda" else time_on_host
    return list(timed(islice(turns, repeats), before))


def seconds_waited(work: Sequence[Work], device: torch.device, *, repeats: int, warm_up: int) -> list[float]:
    """Each call's time by the host's clock, for what waits for the device itself: what a user waits for."""
    for each in islice(cycle(work), max(1, warm_up)):
        each()
    seconds = []
    for each in islice(cycle(work), repeats):
        synchronize(device)
        started = time.perf_counter()
        each()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def time_on_gpu(work: Iterator[Work], before: Work) -> Iterator[float]:
    """By events, every region queued behind a pause."""
    pairs = []
    for each in work:
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        each()
        end.record()
        pairs.append((start, end))
        # One region at a time: what it allocates is free again for the next one.
        end.synchronize()
    return iter([start.elapsed_time(end) / 1e3 for start, end in pairs])


def time_on_host(work: Iterator[Work], before: Work) -> Iterator[float]:
    for each in work:
        before()
        started = time.perf_counter()
        each()
        yield time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def number_of_sets(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs together are four times as large as the GPU's cache; at most 64."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, max(1, math.ceil(4 * cache / max(1, bytes_of_one))))


def size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def copy_bandwidth(device: torch.device, gigabytes: float = 2.0) -> float:
    """Bytes/s, read plus written, of a copy inside the device's memory."""
    count = int(gigabytes * 1e9) // 4
    source, target = torch.randn(count, device=device), torch.empty(count, device=device)
    found = measure([lambda: target.copy_(source)], device, repeats=20)
    return 2 * size([source]) / found.median


def matmul_rate(device: torch.device, width: int = 8192) -> float:
    """FLOP/s of a square bf16 product of random numbers."""
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    found = measure([lambda: torch.mm(a, b, out=out)], device, repeats=20)
    return 2 * width**3 / found.median


def rates(device: torch.device, *, small: bool = False) -> dict[str, float]:
    """Both, measured now; `small` only shows that it works."""
    return {
        "copy_bytes_per_s": copy_bandwidth(device, 0.01 if small else 2.0),
        "matmul_flops_per_s": matmul_rate(device, 256 if small else 8192),
    }
