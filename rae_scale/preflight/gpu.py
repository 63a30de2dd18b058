"""The state of this process's GPU: from PyTorch, and from nvidia-smi, which comes with the driver."""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import dataclass

import torch

from rae_scale.bench.machine import nvidia_smi

MIB = 1 << 20
STATE = (
    "temperature.gpu",
    "power.limit",
    "power.default_limit",
    "ecc.errors.uncorrected.volatile.total",
    "pcie.link.width.current",
    "pcie.link.width.max",
)
ROWS = ("remapped_rows.pending", "remapped_rows.failure")
# The newer driver's name, and the older one's: one name that a driver does not know fails a whole query.
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# nvml.h, nvmlClocksEventReasons: those that no healthy GPU has, and that its own power cap does not explain.
SLOWDOWNS = {
    0x8: "hardware slowdown",
    0x20: "too hot (software)",
    0x40: "too hot (hardware)",
    0x80: "power brake of the machine",
}
STEP = 64 * MIB
"""Memory is allocated to within so much."""


@dataclass(frozen=True)
class GPUFacts:
    """None is what the driver does not tell. memory in bytes: total, free before anything was allocated, and what a
    single allocation got. slowdowns: why the clock is held down, at the time of asking.
    others: processes that hold memory of this GPU, in words."""

    name: str
    memory_total: int
    memory_free: int
    allocatable: int
    slowdowns: tuple[str, ...] = ()
    temperature: float | None = None
    power_limit: float | None = None
    power_default: float | None = None
    ecc_errors: float | None = None
    pcie_width: float | None = None
    pcie_width_max: float | None = None
    rows_pending: bool = False
    rows_failed: bool = False
    others: tuple[str, ...] = ()


def gpu_facts(device: torch.device) -> GPUFacts:
    """Takes all of the GPU's memory for a moment."""
    torch.cuda.set_device(device)
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    state = dict(zip(STATE, map(number, nvidia_smi(device, *STATE)), strict=True))
    pending, remap_failed = ((value or "").lower() in ("yes", "1") for value in nvidia_smi(device, *ROWS))
    return GPUFacts(
        properties.name,
        memory_total=total,
        memory_free=free,
        allocatable=allocatable(device, free),
        slowdowns=slowdowns(device),
        temperature=state["temperature.gpu"],
        power_limit=state["power.limit"],
        power_default=state["power.default_limit"],
        ecc_errors=state["ecc.errors.uncorrected.volatile.total"],
        pcie_width=state["pcie.link.width.current"],
        pcie_width_max=state["pcie.link.width.max"],
        rows_pending=pending,
        rows_failed=remap_failed,
        others=other_processes(f"GPU-{properties.uuid}"),
    )


def allocatable(device: torch.device, free: int) -> int:
    """Bytes of the largest tensor that can be made: `mem_get_info` counts what a sick or shared GPU does not give."""
    torch.cuda.empty_cache()
    size = free // STEP * STEP
    while size > 0:
        try:
            torch.empty(size, dtype=torch.uint8, device=device)
        except torch.cuda.OutOfMemoryError:
            size -= max(STEP, size // 50 // STEP * STEP)
        else:
            break
    torch.cuda.empty_cache()
    return max(0, size)


def slowdowns(device: torch.device) -> tuple[str, ...]:
    """Why the clock of `device` is held down now."""
    for field in REASONS:
        (text,) = nvidia_smi(device, field)
        if text is not None:
            return slowdown_names(text)
    return ()


def slowdown_names(mask: str) -> tuple[str, ...]:
    """mask: as nvidia-smi prints it, 0x0000000000000008."""
    try:
        bits = int(mask, 16)
    except ValueError:
        return ()
    return tuple(name for bit, name in SLOWDOWNS.items() if bits & bit)


def number(text: str | None) -> float | None:
    """None for [N/A] and what else is no number."""
    with contextlib.suppress(TypeError, ValueError):
        return float(text)  # type: ignore[arg-type]
    return None


def other_processes(uuid: str) -> tuple[str, ...]:
    """In a container the driver shows none of other containers."""
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    return tuple(f"pid {row[1]} ({row[2]} MiB)" for row in rows if len(row) == 3 and row[0] == uuid)
