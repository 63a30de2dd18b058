"""Sums and counts of one step, and what they say about the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Value: TypeAlias = Tensor | float


class SumMeter:
    """Named (sum, count) pairs of this rank, added without waiting for the device, reduced over ranks once per step."""

    def __init__(self) -> None:
        self.totals: dict[str, list[Value]] = {}

    def add(self, name: str, total: Value, count: Value) -> None:
        pair = self.totals.setdefault(name, [0.0, 0.0])
        pair[0] = pair[0] + (total.detach().double() if isinstance(total, Tensor) else total)
        pair[1] = pair[1] + (count.detach().double() if isinstance(count, Tensor) else count)

    def reduce(self, all_reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, tuple[float, float]]:
        """Return the global (sum, count) of every name, float64. Every rank must have added the same names."""
        names = sorted(self.totals)
        local = [torch.as_tensor(value, dtype=torch.float64, device=device) for n in names for value in self.totals[n]]
        if not local:
            return {}
        values = all_reduce(torch.stack(local)).tolist()
        return {name: (values[2 * i], values[2 * i + 1]) for i, name in enumerate(names)}


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float | None]:
    """Sum over count; None where nothing was counted (a step without answer images has no flow loss)."""
    return {name: total / count if count else None for name, (total, count) in sums.items()}


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: the allocator's on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
