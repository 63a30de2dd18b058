"""The machines of a run: a host file, or this one."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(r"(?P<name>[^\s#]+)(?:\s+(?:slots|max_slots)\s*=\s*(?P<slots>\d+))?")


@dataclass(frozen=True)
class Host:
    """slots: processes that it takes; None where the file does not say."""

    name: str
    slots: int | None


def read_hostfile(path: Path) -> list[Host]:
    """One machine a line: `name slots=8`, as DeepSpeed and Open MPI read it; `#` begins a comment.

    Raises:
        ValueError: a line of another form, a machine twice, or none at all.
    """
    if not path.is_file():
        raise ValueError(
            f"--hostfile {path}: no such file; write one line per machine, for example: gpu-node-1 slots=8"
        )
    hosts: list[Host] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        content = text.partition("#")[0].strip()
        if not content:
            continue
        match = LINE.fullmatch(content)
        if match is None or match["name"].startswith("-"):
            raise ValueError(f"{path} line {number}: {text!r} is not of the form: gpu-node-1 slots=8")
        if match["slots"] is not None and int(match["slots"]) == 0:
            raise ValueError(f"{path} line {number}: {match['name']} has no slots; leave the line out")
        if any(host.name == match["name"] for host in hosts):
            raise ValueError(f"{path} line {number}: {match['name']} is there twice; keep one line with all its slots")
        hosts.append(Host(match["name"], None if match["slots"] is None else int(match["slots"])))
    if not hosts:
        raise ValueError(f"{path}: no machine in it; write one line per machine, for example: gpu-node-1 slots=8")
    return hosts


def count_gpus(environ: Mapping[str, str]) -> int:
    """The GPUs that this shell may use; asking torch would take seconds."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() and device.strip() != "-1"])
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return len([line for line in listing.stdout.splitlines() if line.startswith("GPU")])


def threads_per_process(processes: int, environ: Mapping[str, str]) -> str:
    """OMP_NUM_THREADS: as the user has set it, or a share of the cores that this process may use."""
    return environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // processes))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
