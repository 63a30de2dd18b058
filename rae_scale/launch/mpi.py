"""mpirun, which starts every process itself. Open MPI, or MPICH and Intel MPI, which share Hydra's options."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from typing import Literal

from rae_scale.launch.command import Command, Launch, NodeCommand, StopBy
from rae_scale.launch.environment import to_other_machines
from rae_scale.launch.hosts import threads_per_process
from rae_scale.launch.place import Place

Flavour = Literal["openmpi", "mpich"]


def launch(place: Place, flavour: Flavour, environ: Mapping[str, str]) -> Launch:
    """One command, here. Every process is told where rank 0 listens, which mpirun does not say."""
    most = max(place.slots(node) for node in range(place.nodes))
    meeting = {"MASTER_ADDR": place.master_addr, "MASTER_PORT": str(place.master_port)}
    own = {"OMP_NUM_THREADS": threads_per_process(most, environ)} | dict(place.environment) | meeting
    passed = own if place.nodes == 1 else to_other_machines(environ, own).variables
    argv = ["mpirun", "-np", str(place.processes)]
    if flavour == "openmpi":
        argv += ["--host", ",".join(f"{host.name}:{host.slots}" for host in place.hosts)]
        # By default each process is bound to one core, which its decoding threads would then share.
        argv += ["--bind-to", "none"]
        for name, value in passed.items():
            argv += ["-x", f"{name}={value}"]
    else:
        argv += ["-hosts", ",".join(f"{host.name}:{host.slots}" for host in place.hosts)]
        for name, value in passed.items():
            argv += ["-genv", name, value]
    command = Command((*argv, place.python, "-u", "-m", "rae_scale", *place.subject.command), {}, StopBy.LAUNCHER)
    return Launch((NodeCommand(", ".join(host.name for host in place.hosts), command),), (0,))


def installed_flavour() -> Flavour:
    """Open MPI where there is none: then nothing can run, and a dry run has to show one."""
    program = shutil.which("mpirun")
    if program is None:
        return "openmpi"
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return "mpich" if "HYDRA" in told.upper() or "Intel" in told else "openmpi"
