"""`rae-scale launch`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rae_scale.launch.prepare import Prepared


class Launcher(StrEnum):
    torchrun = "torchrun"
    deepspeed = "deepspeed"
    slurm = "slurm"
    kubernetes = "kubernetes"
    docker = "docker"
    compose = "compose"
    mpi = "mpi"


class Rendezvous(StrEnum):
    static = "static"
    c10d = "c10d"


class Shell(StrEnum):
    pdsh = "pdsh"
    openssh = "openssh"


class Mpi(StrEnum):
    openmpi = "openmpi"
    mpich = "mpich"


class Kind(StrEnum):
    trainjob = "trainjob"
    pytorchjob = "pytorchjob"
    job = "job"


# What stands behind the first word that is no option belongs to that command.
SETTINGS = {"allow_interspersed_args": False}
Names = Annotated[list[str] | None, typer.Option()]


def launch(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="Such as: train CONFIG KEY=VALUE")],
    launcher: Annotated[Launcher, typer.Option("--with", help="What starts the processes.")] = Launcher.torchrun,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines; default 1, or those of --hostfile.")] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="On each node; default: the GPUs here, or what parallel.* and --nodes make."),
    ] = None,
    hostfile: Annotated[Path | None, typer.Option(help="One machine per line: name slots=8.")] = None,
    node_rank: Annotated[int | None, typer.Option(help="This machine's number; starts only its processes.")] = None,
    master_addr: Annotated[str | None, typer.Option(help="Address of node 0, as all nodes know it.")] = None,
    master_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Free on node 0; default: 29500, on one machine any.")
    ] = None,
    rendezvous: Annotated[Rendezvous, typer.Option(help="How torchrun's agents meet.")] = Rendezvous.static,
    shell: Annotated[
        Shell | None,
        typer.Option("--ssh", help="How to reach --hostfile; default: pdsh for deepspeed, else openssh."),
    ] = None,
    no_ssh: Annotated[
        bool, typer.Option("--no-ssh", help="Start only --node-rank, though there is a host file.")
    ] = False,
    stop_with_stdin: Annotated[bool, typer.Option("--stop-with-stdin", hidden=True)] = False,
    mpi: Annotated[Mpi | None, typer.Option(help="Whose options mpirun has; default: it is asked.")] = None,
    image: Annotated[str | None, typer.Option(help="Container image (docker, compose, kubernetes).")] = None,
    kind: Annotated[Kind, typer.Option(help="What Kubernetes is given.")] = Kind.trainjob,
    name: Annotated[str, typer.Option(help="Of the job (slurm, kubernetes).")] = "rae-scale",
    namespace: Annotated[str | None, typer.Option(help="Of Kubernetes.")] = None,
    mount: Annotated[
        list[str] | None, typer.Option(metavar="FROM:PATH", help="A host folder, or a Kubernetes volume claim; repeat.")
    ] = None,
    rdma: Annotated[
        list[str] | None,
        typer.Option(help="Network device: /dev/infiniband (docker), RESOURCE=COUNT (kubernetes); repeat."),
    ] = None,
    shm: Annotated[str | None, typer.Option(help="Size of a container's /dev/shm; default 16 GB.")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="For sbatch, such as --sbatch=--time=24:00:00; repeat.")
    ] = None,
    lead: Annotated[int, typer.Option(min=1, help="Seconds before SLURM's time limit at which the run saves.")] = 300,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="A variable for all processes; repeat. NAME: as it is here."),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="Failures in a row without a further step that are followed by another start.")
    ] = 0,
    fit: Annotated[
        bool, typer.Option("--fit", help="Let parallel.dp_shard take up the number of processes; same global batch.")
    ] = False,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="First `rae-scale preflight` on the same nodes.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print exactly what each node would execute, and execute nothing.")
    ] = False,
) -> None:
    """Start a rae-scale command on one machine or many, and keep a training running.

    Exit status: 0 finished, 75 stopped and saved (start it again), else failed. docs/launching.md has every way.
    """
    import os

    from rae_scale.launch.prepare import Request, prepare

    request = Request(
        launcher=launcher.value,
        command=tuple(command),
        nodes=nodes,
        processes=processes,
        hostfile=hostfile,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
        rendezvous=rendezvous.value,
        ssh=None if shell is None else shell.value,
        no_ssh=no_ssh,
        mpi=None if mpi is None else mpi.value,
        image=image,
        kind=kind.value,
        name=name,
        namespace=namespace,
        mounts=tuple(mount or ()),
        rdma=tuple(rdma or ()),
        shm=shm,
        sbatch=tuple(sbatch or ()),
        lead_s=lead,
        env=tuple(env or ()),
        restarts=restarts,
        fit=fit,
        preflight=preflight,
    )
    prepared = prepare(request, os.environ)
    explain(prepared)
    if dry_run:
        print(prepared.what.script(), end="")
        return
    from rae_scale.launch.execute import execute

    raise typer.Exit(execute(request, prepared, os.environ, stop_with_stdin))


def explain(prepared: Prepared) -> None:
    """On stderr: which variables look like secrets and stay here."""
    if prepared.passed is not None and prepared.passed.held_back:
        names = ", ".join(prepared.passed.held_back)
        typer.echo(f"not passed on, since they look like secrets: {names} (--env NAME passes one)", err=True)
