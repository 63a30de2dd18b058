"""The benchmarks of operators and of attention whole: run, and put into data and markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rae_scale.bench import attention, kernels
from rae_scale.bench.cases import CASES, Builder
from rae_scale.bench.kernels import Way
from rae_scale.bench.machine import environment
from rae_scale.bench.results import heading, table, write
from rae_scale.bench.timing import rates


class Report(NamedTuple):
    """What was measured, and the same as markdown."""

    name: str
    data: dict[str, Any]
    text: str

    def write(self, folder: Path) -> None:
        """NAME.json and NAME.md."""
        write(folder, self.name, self.data, self.text)


def bench_kernels(
    device: torch.device,
    *,
    tokens: int,
    hidden: int,
    head_dim: int,
    against: Sequence[Way] = (),
    only: Sequence[str] = (),
    repeats: int = 30,
    small: bool = False,
) -> Report:
    """Correctness and speed of every memory-bound operation, or of those in `only`. small: ceilings from a small
    measurement, which says nothing."""
    names, found = list(only) or list(CASES), rates(device, small=small)
    settings = {"tokens": tokens, "hidden": hidden, "head_dim": head_dim, "repeats": repeats}

    def builder() -> Builder:
        return Builder(tokens, hidden, head_dim, device)

    checks = [row for case in kernels.build(names, builder()) for row in kernels.check_case(case)]
    timings = []
    for name in names:
        timings += kernels.time_operation(name, builder, ("ours", *against), found["copy_bytes_per_s"], repeats)
    where = environment(device)
    data = {"environment": where, "settings": settings, "rates": found, "checks": checks, "timings": timings}
    copy, matmul = found["copy_bytes_per_s"] / 1e9, found["matmul_flops_per_s"] / 1e12
    parts = [
        heading("Operations", where, settings),
        f"copy {copy:.0f} GB/s, bf16 matmul {matmul:.1f} TFLOP/s, both measured in this process; bytes: each input "
        "read once, each result written once\n",
        table(timings, kernels.TIMING_COLUMNS),
        "\nErrors are relative to float64, `||a - b|| / ||b||`:\n",
        table(checks, kernels.CHECK_COLUMNS),
    ]
    return Report("kernels", data, "\n".join(parts))


def bench_attention(
    device: torch.device,
    *,
    shapes: Sequence[tuple[int, int]],
    lengths: Sequence[int],
    total_tokens: int,
    repeats: int = 20,
) -> Report:
    rows = list(attention.bench_attention(shapes, lengths, total_tokens, device, repeats))
    settings = {"total_tokens": total_tokens, "repeats": repeats}
    where = environment(device)
    data = {"environment": where, "settings": settings, "timings": rows}
    return Report("attention", data, heading("Attention", where, settings) + "\n" + table(rows, attention.COLUMNS))
