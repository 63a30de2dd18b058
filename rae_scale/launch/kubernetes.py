"""Manifests: Kubeflow's TrainJob and PyTorchJob, and a plain indexed Job. All run one `rae-scale launch` per pod.

What the pods must know of each other (their number, the first one's name) the controllers put into variables, which the
kubelet fills in where $(NAME) stands in the arguments. The first pod's name appears in DNS when that pod does: the
command within waits for it.

A pod that was asked to stop exits with 75, and starts again without being counted; other failures are counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml

from rae_scale.launch.command import Submission
from rae_scale.launch.entry import Entry
from rae_scale.launch.pod import CONTAINER, Pod
from rae_scale.launch.requeue import REQUEUE

Kind = Literal["trainjob", "pytorchjob", "job"]
PORT = 29500
NAME = re.compile(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?")
EVICTED = [{"type": "DisruptionTarget", "status": "True"}]


@dataclass(frozen=True)
class ClusterJob:
    """restarts: failed attempts that are followed by another one."""

    name: str
    pod: Pod
    command: tuple[str, ...]
    nodes: int
    processes: int
    restarts: int = 3
    namespace: str | None = None
    fit: bool = False
    preflight: bool = False

    def metadata(self) -> dict[str, Any]:
        where = {} if self.namespace is None else {"namespace": self.namespace}
        return {"name": self.name, **where, "labels": {"app.kubernetes.io/name": "rae-scale"}}

    def args(self, node_rank: str, master_addr: str, master_port: str = str(PORT), restarts: int = 0) -> list[str]:
        # A $(NAME) in the user's words is not for the kubelet.
        command = tuple(word.replace("$", "$$") for word in self.command)
        return Entry(
            command,
            str(self.nodes),
            self.processes,
            node_rank,
            master_addr,
            master_port,
            restarts=restarts,
            fit=self.fit,
            preflight=self.preflight,
        ).words()


def train_job(job: ClusterJob) -> list[dict[str, Any]]:
    """A TrainingRuntime, which has all that a TrainJob cannot say about its pods, and the TrainJob that uses it.

    The pods restart together. JobSet gives them names: pod 0's is in PET_MASTER_ADDR.
    """
    args = job.args("$(PET_NODE_RANK)", "$(PET_MASTER_ADDR)", "$(PET_MASTER_PORT)")
    pods = {
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [REQUEUE]},
                },
                {"action": "FailJob", "onPodConditions": EVICTED},
            ]
        },
        "template": {"spec": job.pod.spec(args, "Never")},
    }
    trainer = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": job.metadata(),
        "spec": {
            "mlPolicy": {"numNodes": job.nodes, "torch": {}},
            "template": {
                "spec": {
                    "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                    "failurePolicy": {
                        "maxRestarts": job.restarts,
                        # What the pods' own policy names above: asked to stop, or evicted.
                        "rules": [
                            {
                                "name": "requeue",
                                "action": "RestartJobSetAndIgnoreMaxRestarts",
                                "onJobFailureReasons": ["PodFailurePolicy"],
                                "targetReplicatedJobs": [CONTAINER],
                            }
                        ],
                    },
                    "replicatedJobs": [{"name": CONTAINER, "template": {"metadata": trainer, "spec": pods}}],
                }
            },
        },
    }
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": job.name}
    instance = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": job.metadata(),
        "spec": {
            "runtimeRef": reference,
            "trainer": {"numNodes": job.nodes, "numProcPerNode": job.processes},
        },
    }
    return [runtime, instance]


def pytorch_job(job: ClusterJob) -> list[dict[str, Any]]:
    """A master and workers. The operator makes a service for each, and sets RANK to the number of the pod."""
    # The kubelet restarts a container that has failed, in its pod. Not `ExitCode`: that takes 75 for a final failure.
    spec = job.pod.spec(job.args("$(RANK)", "$(MASTER_ADDR)", "$(MASTER_PORT)"), "OnFailure", "pytorch")
    # The operator's own field decides.
    del spec["restartPolicy"]
    replicas = {"Master": 1, "Worker": job.nodes - 1}
    return [
        {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": job.metadata(),
            "spec": {
                "nprocPerNode": str(job.processes),
                "runPolicy": {"backoffLimit": job.restarts, "cleanPodPolicy": "Running"},
                "pytorchReplicaSpecs": {
                    role: {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": spec}}
                    for role, count in replicas.items()
                    if count
                },
            },
        }
    ]


def indexed_job(job: ClusterJob) -> list[dict[str, Any]]:
    """A Job of numbered pods, and the headless service under which their names are found."""
    first_pod = f"{job.name}-0.{job.name}"
    spec = job.pod.spec(job.args("$(JOB_COMPLETION_INDEX)", first_pod), "Never")
    requeue = {"containerName": CONTAINER, "operator": "In", "values": [REQUEUE]}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": job.metadata(),
        "spec": {
            "clusterIP": "None",
            # They find each other before any of them is ready.
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": job.name},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }
    instance = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": job.metadata(),
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            # Each pod counts, and one that fails takes the others with it.
            "backoffLimit": job.restarts * job.nodes,
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onExitCodes": requeue},
                    {"action": "Ignore", "onPodConditions": EVICTED},
                ]
            },
            "template": {"spec": {"subdomain": job.name, **spec}},
        },
    }
    return [service, instance]


KINDS: dict[Kind, Callable[[ClusterJob], list[dict[str, Any]]]] = {
    "trainjob": train_job,
    "pytorchjob": pytorch_job,
    "job": indexed_job,
}


def submission(kind: Kind, job: ClusterJob) -> Submission:
    """
    Raises:
        ValueError: the name is none for Kubernetes.
    """
    if not NAME.fullmatch(job.name):
        raise ValueError(
            f"--name {job.name!r}: Kubernetes takes at most 50 lower-case letters, digits and hyphens, from a letter on"
        )
    job = replace(job, pod=replace(job.pod, secret=job.name))
    return Submission(("kubectl", "apply", "--filename", "-"), to_yaml(KINDS[kind](job)))


def to_yaml(documents: Sequence[dict[str, Any]]) -> str:
    class Plain(yaml.SafeDumper):
        """Writes what occurs twice twice: kubectl reads no anchors of ours."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump_all(documents, Dumper=Plain, sort_keys=False, width=1000, explicit_start=True)
