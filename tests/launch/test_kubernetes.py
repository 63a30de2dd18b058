"""Manifests are valid by the published schemas, and say what a training on several nodes needs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import yaml

from rae_scale.launch.kubernetes import KINDS, ClusterJob, Kind, submission
from rae_scale.launch.pod import Pod, check_mounts, check_rdma
from tests.launch.schemas import validate

POD = Pod(
    "registry/rae-scale:1",
    grace_s=1890,
    gpus=8,
    mounts=("data:/app/data", "runs:/app/runs"),
    rdma=("rdma/ib=2",),
    shm="64Gi",
    environment={"NCCL_DEBUG": "INFO", "ODD": "$(RANK)"},
    secrets=("HF_TOKEN",),
)
JOB = ClusterJob("pretrain", POD, ("train", "x.yaml", "run.dir=runs/$(HOME)"), 4, 8, restarts=3, namespace="research")
ALL: list[Kind] = ["trainjob", "pytorchjob", "job"]


def documents(kind: Kind, job: ClusterJob = JOB) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(submission(kind, job).text))


def pods(kind: Kind, job: ClusterJob = JOB) -> list[dict[str, Any]]:
    """The pod specs."""
    by_kind = {each["kind"]: each["spec"] for each in documents(kind, job)}
    if kind == "trainjob":
        (replicated,) = by_kind["TrainingRuntime"]["template"]["spec"]["replicatedJobs"]
        return [replicated["template"]["spec"]["template"]["spec"]]
    if kind == "pytorchjob":
        return [each["template"]["spec"] for each in by_kind["PyTorchJob"]["pytorchReplicaSpecs"].values()]
    return [by_kind["Job"]["template"]["spec"]]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("nodes", [1, 4])
def test_valid_by_the_schema(kind: Kind, nodes: int) -> None:
    for document in documents(kind, replace(JOB, nodes=nodes)):
        validate(document)


@pytest.mark.parametrize("kind", ALL)
def test_the_schema_sees_mistakes(kind: Kind) -> None:
    for document in documents(kind):
        wrong = copy.deepcopy(document)
        wrong["spec"]["numnodes"] = 4
        with pytest.raises(ValueError, match="numnodes"):
            validate(wrong)


@pytest.mark.parametrize("kind", ALL)
def test_what_every_pod_has(kind: Kind) -> None:
    for pod in pods(kind):
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "rdma/ib": "2"}
        assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
        mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
        assert list(mounts.values()) == ["/dev/shm", "/app/data", "/app/runs"]
        volumes = {each["name"]: each for each in pod["volumes"]}
        assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
        assert [volumes[name].get("persistentVolumeClaim") for name in mounts][1:] == [
            {"claimName": "data"},
            {"claimName": "runs"},
        ]
        assert pod["terminationGracePeriodSeconds"] == 1890


@pytest.mark.parametrize(
    ("kind", "rank", "first"),
    [
        ("trainjob", "$(PET_NODE_RANK)", "$(PET_MASTER_ADDR)"),
        ("pytorchjob", "$(RANK)", "$(MASTER_ADDR)"),
        ("job", "$(JOB_COMPLETION_INDEX)", "pretrain-0.pretrain"),
    ],
)
def test_every_pod_launches_its_processes(kind: Kind, rank: str, first: str) -> None:
    for pod in pods(kind):
        args = pod["containers"][0]["args"]
        options = dict(zip(args[1 : args.index("--")][::2], args[2 : args.index("--")][::2], strict=True))
        assert args[0] == "launch"
        assert options["--with"] == "torchrun"
        assert (options["--nodes"], options["--processes"]) == ("4", "8")
        assert (options["--node-rank"], options["--master-addr"]) == (rank, first)
        # The kubelet makes $(HOME) of $$(HOME).
        assert args[args.index("--") + 1 :] == ["train", "x.yaml", "run.dir=runs/$$(HOME)"]


@pytest.mark.parametrize("kind", ALL)
def test_secrets_are_named_and_not_shown(kind: Kind) -> None:
    for pod in pods(kind):
        variables = {each["name"]: each for each in pod["containers"][0]["env"]}
        assert variables["HF_TOKEN"] == {
            "name": "HF_TOKEN",
            "valueFrom": {"secretKeyRef": {"name": "pretrain", "key": "HF_TOKEN"}},
        }
        assert variables["ODD"]["value"] == "$$(RANK)"


def test_a_trainjobs_stop_is_not_counted_and_a_failure_is() -> None:
    runtime, job = documents("trainjob")
    jobset = runtime["spec"]["template"]["spec"]
    assert jobset["failurePolicy"]["maxRestarts"] == 3
    (rule,) = jobset["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    inner = jobset["replicatedJobs"][0]["template"]["spec"]
    assert inner["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]
    assert inner["template"]["spec"]["restartPolicy"] == "Never"
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert (job["spec"]["trainer"]["numNodes"], job["spec"]["trainer"]["numProcPerNode"]) == (4, 8)


def test_a_pytorchjob_restarts_after_75() -> None:
    (job,) = documents("pytorchjob")
    roles = job["spec"]["pytorchReplicaSpecs"]
    assert {role: each["replicas"] for role, each in roles.items()} == {"Master": 1, "Worker": 3}
    # ExitCode would take 75 for final.
    assert {each["restartPolicy"] for each in roles.values()} == {"OnFailure"}
    assert job["spec"]["runPolicy"]["backoffLimit"] == 3
    assert list(documents("pytorchjob", replace(JOB, nodes=1))[0]["spec"]["pytorchReplicaSpecs"]) == ["Master"]


def test_an_indexed_jobs_pods_have_names() -> None:
    service, job = documents("job")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert spec["podFailurePolicy"]["rules"][0]["action"] == "Ignore"


@pytest.mark.parametrize("kind", ALL)
def test_no_gpu_no_network_device(kind: Kind) -> None:
    for pod in pods(kind, replace(JOB, pod=replace(POD, gpus=0, rdma=()))):
        assert pod["containers"][0]["resources"]["limits"] == {}
        assert "securityContext" not in pod["containers"][0]


def test_wrong_names_and_settings() -> None:
    with pytest.raises(ValueError, match="--name 'My_Job'"):
        submission("job", replace(JOB, name="My_Job"))
    with pytest.raises(ValueError, match="write CLAIM:PATH"):
        check_mounts(["data"], "CLAIM")
    with pytest.raises(ValueError, match="write RESOURCE=COUNT"):
        check_rdma(["/dev/infiniband"])


def test_every_kind_is_tested() -> None:
    assert set(KINDS) == set(ALL)
