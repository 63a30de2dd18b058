"""Do what was prepared: hand it to another program, or run it here under supervision."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rae_scale.launch.command import Command, Launch, StopBy, Submission
from rae_scale.launch.place import wait_for_name
from rae_scale.launch.prepare import Prepared, Request, preflight_of, prepare
from rae_scale.launch.requeue import Restarts
from rae_scale.launch.supervise import FIRST_WAIT_S, Supervisor, configure_logging

# Nodes that restart by themselves must not meet another's last attempt, whose ranks end 30 s after a failure at most.
OTHERS_END_S = 45.0
INSTALL = {
    "docker": "install Docker, or copy the command to a machine that has it",
    "kubectl": "install kubectl, or apply what --dry-run prints elsewhere",
    "mpirun": "install Open MPI or MPICH, or load its module",
    "pdsh": "install pdsh, or use --ssh openssh",
    "sbatch": "run this on a login node of the SLURM cluster, or submit what --dry-run prints there",
    "ssh": "install an OpenSSH client, or start each node with --no-ssh --node-rank",
}


def execute(request: Request, prepared: Prepared, environ: Mapping[str, str], stop_with_stdin: bool) -> int:
    """Returns the exit status.

    Raises:
        ValueError: a program is missing, or no node of the launch is this machine.
    """
    what = prepared.what
    if isinstance(what, Submission):
        require(what.argv[0])
        return subprocess.run(what.argv, input=what.text, text=True, check=False).returncode
    if not what.here:
        raise ValueError(
            f"this machine is one of {len(what.commands)}; say which with --node-rank (from 0), start the same on "
            "each, or give --hostfile to start all from here"
        )
    for number in what.here:
        require_all(what.commands[number].command)
    if request.launcher == "docker":
        # Signals then reach the container; within it, `rae-scale launch` supervises.
        argv = what.commands[what.here[0]].command.argv
        os.execvp(argv[0], argv)
    configure_logging()
    if request.preflight:
        checks = prepare(preflight_of(request, prepared), environ)
        status = supervisor(request, checks, environ, restarts=None).run()
        if status:
            return status
    watched = supervisor(request, prepared, environ, restarts_of(request, prepared))
    if stop_with_stdin:
        watched.stop_with_stdin()
    return watched.run()


def supervisor(
    request: Request, prepared: Prepared, environ: Mapping[str, str], restarts: Restarts | None
) -> Supervisor:
    subject = prepared.subject
    assert isinstance(prepared.what, Launch)
    # The first attempt is what was prepared; later ones take another free port.
    ready = [prepared]

    def build() -> tuple[Launch, int]:
        now = ready.pop() if ready else prepare(replace(request, command=subject.command, fit=False), environ)
        assert isinstance(now.what, Launch)
        return now.what, now.port

    timeout_s = 0.0 if subject.config is None else subject.config.fault.start_timeout_s
    if request.master_addr is not None and request.hostfile is None:
        wait_for_name(request.master_addr, timeout_s)
    return Supervisor(
        build,
        subject.folder,
        trains=subject.config is not None,
        restarts=restarts,
        grace_s=subject.grace_s,
        first_wait_s=FIRST_WAIT_S if len(prepared.what.commands) == 1 or request.node_rank is None else OTHERS_END_S,
    )


def restarts_of(request: Request, prepared: Prepared) -> Restarts | None:
    """
    Raises:
        ValueError: nothing would tell whether a restart gets any further.
    """
    if not request.restarts:
        return None
    if prepared.subject.config is None:
        raise ValueError(
            f"--restarts needs a command that goes on where it stopped, such as train; `{request.command[0]}` does not"
        )
    return Restarts(prepared.subject.folder, request.restarts, keeps_count=request.node_rank in (None, 0))


def require_all(command: Command) -> None:
    require(command.argv[0])
    if command.stop_by is StopBy.RUN_FOLDER:
        require("pdsh")


def require(program: str) -> None:
    """
    Raises:
        ValueError: it is not installed.
    """
    if shutil.which(program) is None:
        fix = INSTALL.get(Path(program).name, "put it on the PATH")
        raise ValueError(f"{program} is not on this machine; {fix}")
