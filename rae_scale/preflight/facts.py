"""What one process finds out about itself and its machine; nothing is judged here."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from rae_scale.bench.machine import commit, nvidia_smi, version
from rae_scale.config import Config
from rae_scale.parallel.same import code_files, hash_of, settings_of
from rae_scale.preflight.bounded import Stuck, within
from rae_scale.preflight.files import Cache, Input, RunDir, probe_caches, probe_inputs, probe_run_dir
from rae_scale.preflight.gpu import GPUFacts, gpu_facts
from rae_scale.preflight.place import Place
from rae_scale.preflight.ports import addresses

T = TypeVar("T")

PROBE_SECONDS = 30.0
"""A file server, name server or driver that takes longer is reported as stuck."""
SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
MEMORY_INFO = Path("/proc/meminfo")
CGROUP_LIMIT, CGROUP_USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


@dataclass(frozen=True)
class Host:
    """Bytes: memory that can still be had, and what /dev/shm has and has free. Limits of this process: open files, and
    bytes of locked memory; None is no limit. infiniband: adapters."""

    memory_free: int
    shm_total: int
    shm_free: int
    open_files: int | None
    locked_memory: int | None
    infiniband: tuple[str, ...] = ()
    temporary_free: int = 0


@dataclass(frozen=True)
class Names:
    """unknown: names that this machine does not resolve, with the reason. loopback: whether its own name means itself
    only, or nothing. interface: what the user says gloo shall use."""

    unknown: Mapping[str, str]
    loopback: bool
    interface: str = ""


@dataclass(frozen=True)
class Facts:
    """Of one rank. What is of its whole machine is None on all but the first rank there.

    config, code: hashes. gpus: visible to this process. gpu_problem: why it has none that works.
    stuck: what was asked and gave no answer, by check.
    """

    place: Place
    config: str
    code: str
    versions: Mapping[str, str]
    gpus: int = 0
    gpu: GPUFacts | None = None
    gpu_problem: str = ""
    host: Host | None = None
    names: Names | None = None
    run_dir: RunDir | None = None
    inputs: tuple[Input, ...] | None = None
    caches: tuple[Cache, ...] | None = None
    stuck: Mapping[str, str] = field(default_factory=dict)


def gather_facts(config: Config, place: Place, leads: bool, hosts: Sequence[str], selection: set[str]) -> Facts:
    """leads: this is the first rank of its machine. hosts: names that it should know. selection: checks; what none of
    them looks at is not asked."""
    facts = Facts(place, hash_of(settings_of(config)), hash_of(code_files()), {})
    stuck: dict[str, str] = {}

    def ask(check: str, *others: str, probe: Callable[[], T]) -> T | None:
        """The answer for a check, which others may share; None if none of them is asked for or there is no answer."""
        if not selection.intersection((check, *others)):
            return None
        try:
            return within(PROBE_SECONDS, check, probe)
        except Stuck as error:
            stuck[check] = str(error)
            return None

    found = ask("gpu", "gpu-model", "gpu-memory", "gpu-health", probe=lambda: find_gpu(config.run.device, place))
    gpus, gpu, problem = found or (0, None, "")
    facts = replace(facts, versions=ask("versions", probe=versions) or {}, gpus=gpus, gpu=gpu, gpu_problem=problem)
    if leads:
        facts = replace(
            facts,
            host=ask("host-memory", "shm", "limits", probe=host_facts),
            names=ask("dns", probe=lambda: name_facts(hosts)),
            run_dir=ask("run-dir", "disk", "shared-dir", probe=lambda: probe_run_dir(Path(config.run.dir))),
            inputs=ask("data", "weights", probe=lambda: tuple(probe_inputs(config))),
            caches=ask("cache", probe=lambda: tuple(probe_caches(config))),
        )
    return replace(facts, stuck=stuck)


def versions() -> dict[str, str]:
    """What computes, with the versions that are installed."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("deepspeed", "triton")},
        "commit": commit(),
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        (found["driver"],) = nvidia_smi(torch.device("cuda", torch.cuda.current_device()), "driver_version")
    return {name: value for name, value in found.items() if value is not None}


def find_gpu(device: str, place: Place) -> tuple[int, GPUFacts | None, str]:
    """(visible GPUs, this rank's, why it has none that works)."""
    if device == "cpu":
        return 0, None, ""
    count = torch.cuda.device_count()
    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version").exists()
        return count, None, f"there is a driver, but PyTorch (CUDA {torch.version.cuda}) finds no GPU" if driver else ""
    if place.local_rank >= count:
        return count, None, f"it is process {place.local_rank} of its machine, which has {count} GPUs"
    try:
        return count, gpu_facts(torch.device("cuda", place.local_rank)), ""
    except RuntimeError as error:
        return count, None, str(error).splitlines()[0]


def host_facts() -> Host:
    shm = os.statvfs(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    return Host(
        memory_free=free_memory(),
        shm_total=shm.f_frsize * shm.f_blocks if shm else 0,
        shm_free=shm.f_frsize * shm.f_bavail if shm else 0,
        open_files=limit(resource.RLIMIT_NOFILE),
        locked_memory=limit(resource.RLIMIT_MEMLOCK),
        infiniband=tuple(sorted(path.name for path in INFINIBAND.iterdir())) if INFINIBAND.is_dir() else (),
        temporary_free=shutil.disk_usage(tempfile.gettempdir()).free,
    )


def limit(name: int) -> int | None:
    soft, _ = resource.getrlimit(name)
    return None if soft == resource.RLIM_INFINITY else soft


def free_memory() -> int:
    """Bytes that can be had without swapping, no more than the container's limit leaves."""
    entries = dict(line.split(":") for line in MEMORY_INFO.read_text().splitlines())
    free = int(entries["MemAvailable"].split()[0]) * 1024
    try:
        return min(free, int(CGROUP_LIMIT.read_text()) - int(CGROUP_USED.read_text()))
    except (OSError, ValueError):
        return free  # no limit ("max"), or no container


def name_facts(hosts: Sequence[str]) -> Names:
    unknown: dict[str, str] = {}
    for host in hosts:
        try:
            addresses(host)
        except OSError as error:
            unknown[host] = error.strerror or str(error)
    try:
        own = addresses(socket.gethostname())
    except OSError:
        own = []
    loopback = all(address.startswith("127.") or address == "::1" for address in own)
    return Names(unknown, loopback, os.environ.get("GLOO_SOCKET_IFNAME", ""))
