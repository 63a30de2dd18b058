"""From what the user asked for to what is executed: one function per way to start a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rae_scale.launch import deepspeed, docker, kubernetes, mpi, slurm, ssh, torchrun
from rae_scale.launch.command import Launch, Submission
from rae_scale.launch.entry import Entry
from rae_scale.launch.environment import Passed, explicit, is_secret, to_other_machines
from rae_scale.launch.hosts import Host, count_gpus, free_port, read_hostfile
from rae_scale.launch.place import Place
from rae_scale.launch.pod import Pod, check_mounts, check_rdma
from rae_scale.launch.subject import Subject, check_size, fit, read_subject

Launcher = Literal["torchrun", "deepspeed", "slurm", "kubernetes", "docker", "compose", "mpi"]
DEFAULT_PORT = 29500  # torchrun's and DeepSpeed's
# What these start is elsewhere, where this machine's GPUs and cores mean nothing.
ELSEWHERE = ("slurm", "kubernetes", "compose")


@dataclass(frozen=True)
class Request:
    """The options of `rae-scale launch`; None and () where nothing was said."""

    launcher: Launcher
    command: tuple[str, ...]
    nodes: int | None = None
    processes: int | None = None
    hostfile: Path | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    rendezvous: Literal["static", "c10d"] = "static"
    ssh: Literal["pdsh", "openssh"] | None = None
    no_ssh: bool = False
    mpi: mpi.Flavour | None = None
    image: str | None = None
    kind: kubernetes.Kind = "trainjob"
    name: str = "rae-scale"
    namespace: str | None = None
    mounts: tuple[str, ...] = ()
    rdma: tuple[str, ...] = ()
    shm: str | None = None
    sbatch: tuple[str, ...] = ()
    lead_s: int = 300
    env: tuple[str, ...] = ()
    restarts: int = 0
    fit: bool = False
    preflight: bool = False


@dataclass(frozen=True)
class Prepared:
    """subject: the command with what --fit has changed. passed: which variables other machines get; None if there are
    none, and all is inherited. processes: on the first node. port: MASTER_PORT."""

    subject: Subject
    what: Launch | Submission
    passed: Passed | None
    processes: int
    port: int


def prepare(request: Request, environ: Mapping[str, str]) -> Prepared:
    """
    Raises:
        ValueError: options that contradict each other or the configuration. The message names the fix.
    """
    asked = explicit(request.env, environ)
    subject = read_subject(request.command)
    hosts, gpus = places(request, subject, environ)
    total = sum(host.slots or 0 for host in hosts)
    # A batch system may give fewer nodes than asked for, so that the layout is fitted there.
    if request.fit:
        fitted = fit(subject, total)
        subject = fitted if request.launcher != "slurm" else subject
    else:
        check_size(subject, total)
    port = request.master_port or (free_port() if len(hosts) == 1 and not request.hostfile else DEFAULT_PORT)
    place = Place(
        subject,
        hosts,
        request.master_addr or default_address(request, hosts),
        port,
        own_rank(request, hosts),
        request.rendezvous,
        asked,
        request.hostfile,
        sys.executable,
        gpus,
    )
    if request.launcher in ("torchrun", "deepspeed", "mpi"):
        launch, passed = on_machines(request, place, environ)
        return Prepared(subject, launch, passed, place.slots(0), port)
    given = to_other_machines(environ, asked, containers=request.launcher != "slurm")
    return Prepared(subject, elsewhere(request, place, given), given, place.slots(0), port)


def places(request: Request, subject: Subject, environ: Mapping[str, str]) -> tuple[tuple[Host, ...], int]:
    """The machines with the processes of each, and the GPUs of this one (of each, where none of them is this one)."""
    gpus = 0 if subject.config is not None and subject.config.run.device == "cpu" else count_gpus(environ)
    if request.hostfile is not None:
        if request.launcher in (*ELSEWHERE, "docker"):
            raise ValueError(f"--hostfile is for torchrun, deepspeed and mpi; leave it out with {request.launcher}")
        hosts = read_hostfile(request.hostfile)
        if request.nodes is not None and request.nodes > len(hosts):
            raise ValueError(f"--nodes {request.nodes}, but {request.hostfile} names {len(hosts)} machine(s)")
        default = request.processes or gpus or 1
        # --processes is how many of a machine's slots are used.
        return tuple(
            Host(host.name, min(host.slots or default, request.processes or host.slots or default))
            for host in hosts[: request.nodes]
        ), gpus
    nodes = request.nodes or 1
    processes = request.processes
    if processes is None and request.launcher in ELSEWHERE and subject.config is not None:
        world_size = subject.config.parallel.world_size
        if world_size % nodes:
            raise ValueError(
                f"--nodes {nodes}: the {world_size} processes of parallel.* do not divide by them; give "
                "--processes and --fit, or another number of nodes"
            )
        processes = world_size // nodes
    if processes is None and not gpus and subject.config is not None:
        processes = subject.config.parallel.world_size // nodes
    processes = processes or gpus or 1
    if request.launcher in ELSEWHERE:
        on_cpu = subject.config is not None and subject.config.run.device == "cpu"
        gpus = 0 if on_cpu else processes
    names = ["localhost"] if nodes == 1 else [f"node-{node}" for node in range(nodes)]
    return tuple(Host(name, processes) for name in names), gpus


def own_rank(request: Request, hosts: tuple[Host, ...]) -> int | None:
    if request.node_rank is not None:
        if not 0 <= request.node_rank < len(hosts):
            raise ValueError(f"--node-rank {request.node_rank}: with {len(hosts)} node(s) it is 0 to {len(hosts) - 1}")
        return request.node_rank
    return 0 if len(hosts) == 1 else None


def default_address(request: Request, hosts: tuple[Host, ...]) -> str:
    """Of rank 0's machine."""
    if request.launcher == "compose":
        return "node-0"
    if len(hosts) == 1 and request.hostfile is None:
        return "127.0.0.1"
    if request.hostfile is not None:
        # DeepSpeed asks the first machine itself.
        return "" if uses_pdsh(request) else hosts[0].name
    if request.launcher in ("torchrun", "deepspeed", "docker"):
        raise ValueError(
            f"--nodes {len(hosts)} needs --master-addr, the address of node 0, the same on every node; or give "
            "--hostfile with one machine per line"
        )
    return hosts[0].name


def uses_pdsh(request: Request) -> bool:
    return (
        request.launcher == "deepspeed"
        and request.hostfile is not None
        and not request.no_ssh
        and request.ssh in (None, "pdsh")
    )


def on_machines(request: Request, place: Place, environ: Mapping[str, str]) -> tuple[Launch, Passed | None]:
    """torchrun, DeepSpeed and mpirun."""
    passed = to_other_machines(environ, place.environment)
    if request.launcher == "mpi":
        if place.nodes > 1 and request.hostfile is None:
            raise ValueError("--with mpi on several nodes needs --hostfile with one machine per line")
        flavour = request.mpi or mpi.installed_flavour()
        return mpi.launch(place, flavour, environ), passed if place.nodes > 1 else None
    if request.ssh == "pdsh" and request.launcher == "torchrun":
        raise ValueError("--ssh pdsh is DeepSpeed's; with torchrun a host file means --ssh openssh, the default")
    if request.ssh is not None and (request.no_ssh or request.hostfile is None):
        raise ValueError(f"--ssh {request.ssh} needs --hostfile, and not --no-ssh")
    if request.hostfile is not None and not request.no_ssh:
        if request.node_rank is not None:
            raise ValueError("--node-rank with --hostfile means that each node is started by itself; add --no-ssh")
        if uses_pdsh(request):
            return deepspeed.launch_with_pdsh(place, environ), passed
        return ssh.launch(place, request.launcher, environ), passed
    if request.launcher == "deepspeed":
        if place.nodes > 1 and not request.no_ssh:
            raise ValueError("--with deepspeed on several nodes needs --hostfile, or --no-ssh and --node-rank on each")
        return deepspeed.launch(place, environ), None
    return torchrun.launch(place, environ), None


def elsewhere(request: Request, place: Place, passed: Passed) -> Launch | Submission:
    """Batch systems and containers, which run `rae-scale launch` on every node."""
    secrets = tuple(name for name in request.env if "=" not in name and is_secret(name, passed.variables[name]))
    environment = {name: value for name, value in passed.variables.items() if name not in secrets}
    nodes, processes, command = place.nodes, place.slots(0), place.subject.command
    if request.launcher == "slurm":
        # Named ones come from sbatch's own environment, and stand in no file.
        options = (f"--export={','.join(secrets) or 'NONE'}", *request.sbatch)
        batch = slurm.BatchJob(
            command=command,
            name=request.name,
            nodes=nodes,
            gpus=place.gpus,
            processes=processes,
            lead_s=request.lead_s,
            restarts=request.restarts,
            fit=request.fit,
            preflight=request.preflight,
            options=options,
            environment=environment,
            python=place.python,
        )
        return slurm.submission(batch)
    if request.image is None:
        raise ValueError(f"--with {request.launcher} needs --image, for example the one that `make image` has built")
    if request.launcher == "kubernetes":
        check_mounts(request.mounts, "CLAIM")
        check_rdma(request.rdma)
        pod = Pod(
            request.image,
            round(place.subject.grace_s),
            place.gpus,
            mounts=request.mounts,
            rdma=request.rdma,
            shm=request.shm or "16Gi",
            environment=environment,
            secrets=secrets,
        )
        job = kubernetes.ClusterJob(
            request.name,
            pod,
            command,
            nodes,
            processes,
            request.restarts,
            request.namespace,
            request.fit,
            request.preflight,
        )
        return kubernetes.submission(request.kind, job)
    check_mounts(request.mounts, "HOST")
    containers = docker.Containers(request.image, place.gpus, request.mounts, request.rdma, request.shm or "16g")
    entries = [
        Entry(
            command,
            str(nodes),
            processes,
            str(node),
            place.master_addr,
            str(place.master_port),
            request.restarts,
            preflight=request.preflight,
        )
        for node in range(nodes)
    ]
    if request.launcher == "compose":
        return docker.compose(containers, entries, environment, secrets, round(place.subject.grace_s))
    if place.node_rank is None:
        raise ValueError("--with docker starts one node's container; say which with --node-rank, on each node")
    return docker.launch(containers, entries[place.node_rank], environment, secrets)


def preflight_of(request: Request, prepared: Prepared) -> Request:
    """The same processes on the same machines, running `rae-scale preflight` on the same settings.

    Raises:
        ValueError: the command is no training.
    """
    subject = prepared.subject
    if subject.config is None:
        raise ValueError(f"--preflight checks what a training needs; `{subject.command[0]}` is none, leave it out")
    words = tuple(word for word in subject.command[1:] if not word.startswith("-"))
    processes = prepared.processes if request.hostfile is None else request.processes
    return replace(request, command=("preflight", *words), processes=processes, fit=False, preflight=False)
