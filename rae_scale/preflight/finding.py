"""What a check says about some ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Status = Literal["ok", "warn", "fail"]

CHECKS = {
    "ranks": "every rank comes once, and all agree on how many there are",
    "config": "all ranks have the same settings",
    "code": "all ranks run the same code",
    "versions": "Python, PyTorch, DeepSpeed, Triton, CUDA, NCCL and driver are the same everywhere",
    "gpu": "each rank has a GPU of its own that PyTorch can use",
    "gpu-model": "all GPUs are of one kind",
    "gpu-memory": "what can really be allocated, against the plan",
    "gpu-health": "uncorrected ECC errors, remapped rows, throttling, power cap, PCIe width",
    "host-memory": "what is free on the machine, against the plan",
    "shm": "/dev/shm",
    "limits": "open files and locked memory",
    "run-dir": "run.dir can be written, renamed in and synchronised",
    "disk": "room for the checkpoints that the run keeps",
    "shared-dir": "run.dir is the same folder on all machines",
    "data": "data sources open",
    "weights": "model folders can be read",
    "cache": "the kernel cache is on a local disk",
    "dns": "machines find each other by name",
    "clock": "clocks agree",
    "plan": "the planner can lay the run out",
    "group": "the process group of all ranks can be made",
    "compute": "no rank computes more slowly than the others",
    "bandwidth": "all-reduce over all ranks, against what the network should reach",
    "pairs": "which rank or link is slow; measured if bandwidth is low, or if it is the only one asked for",
}


@dataclass(frozen=True)
class Finding:
    """value: what was found. why: what it would do to the run. fix: what to do. ranks: none is the run as a whole."""

    check: str
    status: Status
    value: str
    why: str = ""
    fix: str = ""
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.check in CHECKS, self.check


def selected(only: Sequence[str], skip: Sequence[str]) -> set[str]:
    """The checks that are asked for.

    Raises:
        ValueError: a name is none of them.
    """
    for option, names in (("--only", only), ("--skip", skip)):
        for name in names:
            if name not in CHECKS:
                raise ValueError(f"{option}={name!r} is no check; choose from {', '.join(CHECKS)}")
    return set(only or CHECKS) - set(skip)


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """In the order of `CHECKS`: those of several ranks that say the same are one, and so are all that are well."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        same = () if finding.status == "ok" else (finding.value, finding.why, finding.fix)
        groups.setdefault((finding.check, finding.status, *same), []).append(finding)
    order = list(CHECKS)
    found = [union(group) for group in groups.values()]
    return sorted(found, key=lambda finding: (order.index(finding.check), finding.status))


def union(group: Sequence[Finding]) -> Finding:
    values = list(dict.fromkeys(finding.value for finding in group))
    more = f" and {len(values) - 2} other values" if len(values) > 2 else ""
    ranks = sorted({rank for finding in group for rank in finding.ranks})
    return replace(group[0], value="; ".join(values[:2]) + more, ranks=tuple(ranks))


def size(count: float) -> str:
    """Bytes in words: "53.7 GB", "4.1 MB"."""
    unit, name = (1e9, "GB") if abs(count) >= 1e8 else (1e6, "MB")
    return f"{count / unit:.1f} {name}"


def failed(findings: Iterable[Finding]) -> bool:
    return any(finding.status == "fail" for finding in findings)
