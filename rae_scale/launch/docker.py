"""Containers without a cluster: `docker run` for this machine, and two or more machines emulated on one by compose."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rae_scale.launch.command import Command, Launch, NodeCommand, Submission
from rae_scale.launch.entry import Entry

# What the training needs of the machine: shared memory for the workers' batches and for NCCL, pages that RDMA may pin.
UNLIMITED = "-1"
STACK_BYTES = 67_108_864


@dataclass(frozen=True)
class Containers:
    """
    image: with `rae-scale` as its entry point. gpus: on each machine, 0 for none. mounts: HOST:CONTAINER folders.
    rdma: devices such as /dev/infiniband, for the network. shm: size of /dev/shm, such as 64g.
    """

    image: str
    gpus: int = 0
    mounts: Sequence[str] = ()
    rdma: Sequence[str] = ()
    shm: str = "16g"


def launch(containers: Containers, entry: Entry, environment: Mapping[str, str], secrets: Sequence[str]) -> Launch:
    """One container on this machine's network; it replaces this process, and signals reach the one within.

    secrets: names whose values docker takes from this shell, so that they stand in no command line.
    """
    argv = ["docker", "run", "--rm", "--init", "--network", "host"]
    if containers.gpus:
        argv += ["--gpus", str(containers.gpus)]
    # --ipc host would do, too, but then the containers of a machine can read each other's shared memory.
    argv += ["--shm-size", containers.shm, "--ulimit", f"memlock={UNLIMITED}", "--ulimit", f"stack={STACK_BYTES}"]
    for device in containers.rdma:
        argv += ["--device", device]
    if containers.rdma:
        argv += ["--cap-add", "IPC_LOCK"]
    # Files in the mounted folders belong to whoever starts it.
    argv += ["--user", f"{os.getuid()}:{os.getgid()}"]
    for mount in containers.mounts:
        argv += ["--volume", mount]
    for name, value in environment.items():
        argv += ["--env", f"{name}={value}"]
    for name in secrets:
        argv += ["--env", name]
    command = Command((*argv, containers.image, *entry.words()))
    return Launch((NodeCommand("this machine", command),), (0,))


def compose(
    containers: Containers,
    entries: Sequence[Entry],
    environment: Mapping[str, str],
    secrets: Sequence[str],
    grace_s: int,
) -> Submission:
    """One service per node of the run, each with a network address of its own, on this machine."""
    # compose replaces $ in values, and takes those without a value from this shell.
    variables = {name: value.replace("$", "$$") for name, value in environment.items()} | dict.fromkeys(secrets)
    services = {f"node-{node}": service(containers, entry, variables, grace_s) for node, entry in enumerate(entries)}
    document = {"name": "rae-scale", "services": services}
    text = yaml.safe_dump(document, sort_keys=False, width=1000)
    return Submission(("docker", "compose", "--file", "-", "up", "--abort-on-container-failure"), text)


def service(containers: Containers, entry: Entry, variables: Mapping[str, str | None], grace_s: int) -> dict[str, Any]:
    node = int(entry.node_rank)
    described: dict[str, Any] = {
        "image": containers.image,
        "hostname": f"node-{node}",
        "command": [word.replace("$", "$$") for word in entry.words()],
        "environment": dict(variables),
        "init": True,
        "shm_size": containers.shm,
        "ulimits": {"memlock": int(UNLIMITED), "stack": STACK_BYTES},
        "user": f"{os.getuid()}:{os.getgid()}",
        "volumes": list(containers.mounts),
        "stop_grace_period": f"{grace_s}s",
    }
    if containers.rdma:
        described |= {"devices": list(containers.rdma), "cap_add": ["IPC_LOCK"]}
    if containers.gpus:
        # Each node has GPUs of its own.
        own = [str(device) for device in range(node * containers.gpus, (node + 1) * containers.gpus)]
        reserved = [{"driver": "nvidia", "device_ids": own, "capabilities": ["gpu"]}]
        described["deploy"] = {"resources": {"reservations": {"devices": reserved}}}
    return described
