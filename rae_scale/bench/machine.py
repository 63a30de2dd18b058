"""What numbers were measured on: GPU and power, versions, commit. Needs PyTorch only."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("triton", "transformers", "deepspeed", "numpy")
CPU_INFO = Path("/proc/cpuinfo")


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit of this process. None is what this machine has not or does not tell.

    device: the name that a baseline's has to equal. power_limit_w: of this process's GPU, now.
    """
    found: dict[str, Any] = {
        "device": cpu_name(),
        "device_count": 1,
        "capability": None,
        "memory_bytes": None,
        "power_limit_w": None,
        "driver": None,
        "cuda": None,
        "nccl": None,
        "cudnn": None,
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in PACKAGES},
        "kernels": os.environ.get("RAE_KERNELS", "auto"),
        "commit": commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        limit, driver = nvidia_smi(device, "power.limit", "driver_version")
        found |= {
            "device": properties.name,
            "device_count": torch.cuda.device_count(),
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory_bytes": properties.total_memory,
            "power_limit_w": watts(limit),
            "driver": driver,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def power_draw(device: torch.device) -> float | None:
    """Watts that this GPU draws, as the driver averages it (about a second, on recent GPUs): to be asked right after
    the work that is meant. None where there is no GPU or no nvidia-smi."""
    if device.type != "cuda":
        return None
    (draw,) = nvidia_smi(device, "power.draw")
    return watts(draw)


def nvidia_smi(device: torch.device, *fields: str) -> list[str | None]:
    """Each of the `fields` of nvidia-smi --query-gpu for this process's GPU; None where it cannot be read."""
    # By UUID: the number of a GPU in this process need not be nvidia-smi's.
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return [None] * len(fields)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return [None if not value or value.startswith("[") else value for value in values]


def watts(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def cpu_name() -> str:
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the checkout that this file is in, with "-dirty" if files were changed; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
