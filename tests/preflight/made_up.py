"""A cluster in good order, in which tests break one thing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rae_scale.preflight.facts import Facts, Host, Names
from rae_scale.preflight.files import Cache, Input, RunDir
from rae_scale.preflight.finding import Finding
from rae_scale.preflight.gpu import GPUFacts
from rae_scale.preflight.needs import Needs
from rae_scale.preflight.place import Place, Roster

GIB = 1 << 30
PER_MACHINE = 2

GPU = GPUFacts(
    "NVIDIA H100 80GB HBM3",
    memory_total=80 * 10**9,
    memory_free=79 * 10**9,
    allocatable=78 * 10**9,
    temperature=40.0,
    power_limit=700.0,
    power_default=700.0,
    ecc_errors=0.0,
    pcie_width=16.0,
    pcie_width_max=16.0,
)
HOST = Host(
    memory_free=10**12,
    shm_total=500 * GIB,
    shm_free=500 * GIB,
    open_files=1 << 20,
    locked_memory=None,
    infiniband=("mlx5_0",),
    temporary_free=100 * GIB,
)
RUN_DIR = RunDir("/shared/run", "lustre", free=10**12, total=10**13)
NEEDS = Needs(
    gpu=60 * 10**9,
    host=16 * 10**9,
    checkpoint=40 * 10**9,
    handed_over=20 * 10**9,
    checkpoints=3,
    forever=0,
    world_size=4,
)
VERSIONS = {"torch": "2.15.0", "python": "3.11.7", "nccl": "2.30.7"}


def place(rank: int, **changes: Any) -> Place:
    node, local = divmod(rank, PER_MACHINE)
    names = f"node{node}", f"m{node}", f"10.0.0.{node}"
    return replace(Place(rank, local, PER_MACHINE, 4, *names, 100 + rank, "torchrun"), **changes)


def facts(rank: int, **changes: Any) -> Facts:
    """Of a rank of two machines with two GPUs each; the first rank of a machine looks around."""
    found = Facts(place(rank), "config-a", "code-a", VERSIONS, gpus=PER_MACHINE, gpu=GPU)
    if rank % PER_MACHINE == 0:
        found = replace(
            found,
            host=HOST,
            names=Names({}, loopback=False),
            run_dir=RUN_DIR,
            inputs=(Input("data.sources[0].path", "/shared/shards", "5 samples"),),
            caches=(Cache("Triton's cache", "/tmp/triton", "ext4"),),
        )
    return replace(found, **changes)


def cluster(*changed: Facts) -> list[Facts]:
    """Four ranks; `changed` take the places of those with their ranks."""
    by_rank = {rank: facts(rank) for rank in range(4)} | {each.place.rank: each for each in changed}
    return list(by_rank.values())


ROSTER = Roster(place(rank) for rank in range(4))


def bad(findings: Any) -> list[Finding]:
    return [finding for finding in findings if finding.status != "ok"]


def only(findings: Any) -> Finding:
    """The one that is not well."""
    (finding,) = bad(findings)
    return finding
