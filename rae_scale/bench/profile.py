"""Where the time of a step goes: by category, from torch.profiler."""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

FAMILIES = ("norm", "qk_rope", "swiglu", "flow")

# The first that matches counts. Names of kernels on a GPU, of PyTorch's operators on a CPU.
PATTERNS = (
    ("our kernels", r"^rae_kernels::|^adamw_\w+float|{ours}"),
    ("attention", r"flash|fmha|attention|sdpa|cudnn_generated"),
    ("optimizer", r"multi_tensor|foreach|fused_adam|adamw|lerp"),
    ("matrix products", r"gemm|nvjet|xmma|cutlass|cublas|splitk|aten::(mm|addmm|bmm|baddbmm|linear)$"),
    ("copies", r"memcpy|memset|aten::(copy_|_to_copy)$"),
    ("compiled", r"^triton_"),
)
OTHER = "elementwise and reductions"

COLUMNS = {"category": "{category}", "ms per step": "{ms:.2f}", "share": "{share:.1%}", "calls": "{calls}"}
KERNEL_COLUMNS = {"kernel": "{name}", "category": "{category}", "ms per step": "{ms:.3f}", "calls": "{calls}"}
LISTED_KERNELS = 30


class Interval(NamedTuple):
    """Microseconds."""

    name: str
    start: float
    end: float


def profile_step(run: Callable[[], None], device: torch.device, trace: Path, steps: int = 2) -> dict[str, Any]:
    """Profile `steps` calls of a step that has been warmed up, and write a Chrome trace to `trace`.

    Returns rows by category, gaps between kernels among them, and the kernels that take longest.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(steps):
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
    trace.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(trace))
    if on_gpu:
        # Ranges that the optimizer marks are shown on the GPU's line as well, around the kernels in them.
        events = [e for e in found.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        intervals = [Interval(event.name, event.time_range.start, event.time_range.end) for event in events]
        return summarise(intervals, steps)
    # On a CPU operators call each other: what counts is the time that each spends itself.
    own = [Interval(event.name, 0.0, event.self_cpu_time_total) for event in found.events()]
    return summarise(own, steps, with_gaps=False)


def summarise(intervals: Iterable[Interval], steps: int, *, with_gaps: bool = True) -> dict[str, Any]:
    """Times per step. Gaps: while no kernel ran, between the first one's start and the last one's end."""
    time_of: defaultdict[str, float] = defaultdict(float)
    calls_of: Counter[str] = Counter()
    intervals = list(intervals)
    for each in intervals:
        time_of[each.name] += each.end - each.start
        calls_of[each.name] += 1
    by_category: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for name, microseconds in time_of.items():
        by_category[category_of(name)] += microseconds
        calls[category_of(name)] += calls_of[name]
    if with_gaps:
        by_category["gaps"] = gaps(intervals)
    total = sum(by_category.values()) or 1.0
    return {
        "categories": [
            {"category": name, "ms": microseconds / 1e3 / steps, "share": microseconds / total, "calls": calls[name]}
            for name, microseconds in longest(by_category)
        ],
        "kernels": [
            {
                "name": name[:120],
                "category": category_of(name),
                "ms": microseconds / 1e3 / steps,
                "calls": calls_of[name] // steps,
            }
            for name, microseconds in longest(time_of)[:LISTED_KERNELS]
        ],
    }


def longest(times: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda item: -item[1])


def gaps(intervals: list[Interval]) -> float:
    """Time that no interval covers, between the first start and the last end."""
    idle, until = 0.0, None
    for each in sorted(intervals, key=lambda interval: interval.start):
        if until is not None and each.start > until:
            idle += each.start - until
        until = each.end if until is None else max(until, each.end)
    return idle


def category_of(name: str) -> str:
    for category, pattern in PATTERNS:
        if re.search(pattern.replace("{ours}", our_kernels()), name, flags=re.IGNORECASE):
            return category
    return OTHER


@functools.cache
def our_kernels() -> str:
    """A pattern for the names of our Triton kernels; of nothing where Triton is not installed."""
    names = set()
    for family in FAMILIES:
        try:
            module = import_module(f"rae_kernels.triton_impl.{family}")
        except ImportError:
            continue
        names |= {variant.kernel.__name__ for variant in module.variants()}
    return "|".join(rf"^{name}$" for name in sorted(names)) or r"^$"
