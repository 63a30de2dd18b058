"""The pod of a node: its container, shared memory, GPUs, network devices and volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CONTAINER = "node"
# The image's user, who owns nothing on a fresh volume otherwise.
USER_ID = 1000


@dataclass(frozen=True)
class Pod:
    """
    image: with `rae-scale` as its entry point. gpus: of each node, as `gpu_resource`. mounts: CLAIM:PATH, volumes that
    all nodes share. rdma: RESOURCE=COUNT as the cluster's device plugin names it, such as rdma/ib=1. shm: size of
    /dev/shm, which counts as the container's memory. secrets: variables from the Secret `secret`, by their own names.
    grace_s: seconds between SIGTERM and the kill.
    """

    image: str
    grace_s: int
    gpus: int = 0
    gpu_resource: str = "nvidia.com/gpu"
    mounts: Sequence[str] = ()
    rdma: Sequence[str] = ()
    shm: str = "16Gi"
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    secret: str = "rae-scale"

    def spec(self, args: Sequence[str], restart_policy: str, name: str = CONTAINER) -> dict[str, Any]:
        """A PodSpec whose container runs `rae-scale` with `args`."""
        return {
            "restartPolicy": restart_policy,
            "terminationGracePeriodSeconds": self.grace_s,
            "securityContext": {"runAsNonRoot": True, "runAsUser": USER_ID, "fsGroup": USER_ID},
            "containers": [self.container(args, name)],
            "volumes": [
                # A container's own /dev/shm is 64 MB: too little for NCCL and for the batches of the data workers.
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": self.shm}},
                *({"name": f"volume-{number}", **claim(mount)} for number, mount in enumerate(self.mounts)),
            ],
        }

    def container(self, args: Sequence[str], name: str) -> dict[str, Any]:
        described: dict[str, Any] = {
            "name": name,
            "image": self.image,
            "args": list(args),
            "env": self.variables(),
            "resources": {"limits": self.resources()},
            "volumeMounts": [
                {"name": "shm", "mountPath": "/dev/shm"},
                *(
                    {"name": f"volume-{number}", "mountPath": mount.partition(":")[2]}
                    for number, mount in enumerate(self.mounts)
                ),
            ],
        }
        if self.rdma:
            # RDMA pins the memory that it sends from.
            described["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
        return described

    def variables(self) -> list[dict[str, Any]]:
        # Kubernetes replaces $(NAME) in values; $$ is a $.
        plain = [
            {"name": name, "value": value.replace("$", "$$")}
            for name, value in self.environment.items()
            if name not in self.secrets
        ]
        return plain + [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": self.secret, "key": name}}} for name in self.secrets
        ]

    def resources(self) -> dict[str, str]:
        """Limits, which are also requests."""
        counts = {self.gpu_resource: str(self.gpus)} if self.gpus else {}
        return counts | dict(split_count(setting) for setting in self.rdma)


def claim(mount: str) -> dict[str, Any]:
    return {"persistentVolumeClaim": {"claimName": mount.partition(":")[0]}}


def split_count(setting: str) -> tuple[str, str]:
    resource, _, count = setting.partition("=")
    return resource, count


def check_mounts(mounts: Sequence[str], what: str) -> None:
    """
    Raises:
        ValueError: one is not of the form `what`:PATH.
    """
    for mount in mounts:
        source, _, target = mount.partition(":")
        if not source or not target.startswith("/"):
            raise ValueError(f"--mount {mount!r}: write {what}:PATH with an absolute path in the container")


def check_rdma(settings: Sequence[str]) -> None:
    """
    Raises:
        ValueError: one is not of the form RESOURCE=COUNT.
    """
    for setting in settings:
        resource, count = split_count(setting)
        if not resource or not count.isdigit() or int(count) == 0:
            raise ValueError(
                f"--rdma {setting!r}: write RESOURCE=COUNT as the cluster's device plugin names it, such as rdma/ib=1"
            )
