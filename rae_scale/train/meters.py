"""Sums and counts of one step, and what they say about the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

# Dense bf16 peak FLOP/s by the exact name that `torch.cuda.get_device_name` returns, from NVIDIA's data sheets
# (half of the figure that they print "with sparsity"). A GPU that is not listed gets no MFU rather than a guess.
# A100: nvidia-a100-datasheet (312); H100: nvidia-h100-datasheet (SXM 1,979 / PCIe 1,513 sparse);
# H200: hopper-hgx-h200-datasheet (1,979 sparse); B200: HGX B200 data sheet (36 PFLOP/s sparse for eight GPUs).
PEAK_BF16_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
}

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


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of `device`, or None when it is not known by its exact name."""
    return PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
