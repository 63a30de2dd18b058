"""Which process of how many this is, read from the variables of whatever started it.

Who is believed, the innermost launcher first:

1. RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: torchrun, DeepSpeed. `srun torchrun` leaves SLURM's
   variables in the environment; they describe torchrun itself, not its processes.
2. Open MPI, MPICH or Intel MPI, MVAPICH2. Inside a SLURM job mpirun starts its daemons with srun, so SLURM's variables
   describe those, unless both say the same (`srun --mpi=pmi2`): then SLURM's, which also tell an address.
3. A task of a SLURM step. The shell of salloc and a batch script belong to a job, too, but run once only.
4. A pod of a Kubernetes indexed job with WORLD_SIZE.

RANK and WORLD_SIZE without LOCAL_RANK are completed from 2 or 3 where those agree, and else are Kubeflow's PyTorchJob.
In 2 to 4 MASTER_ADDR and MASTER_PORT are used where they are set.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from rae_scale.parallel.slurm import first_host, job_port, step_number, tasks_here
from rae_scale.parallel.variables import Environment, integer

ONE_PROCESS = "one process"
LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500  # torchrun's
REQUIRED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# WORLD_SIZE=1 says everything.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(DEFAULT_PORT)}


@dataclass(frozen=True)
class Ranks:
    """This process's place.

    local_rank:       its number on its machine, and thereby its GPU.
    local_world_size: the processes on its machine; None where the launcher does not say.
    master_addr:      the machine of rank 0, as the others reach it.
    source:           who is believed.
    origin:           where world_size comes from, for messages.
    ignored:          what a launcher said that does not count because one process was asked for.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int | None
    master_addr: str
    master_port: int
    source: str
    origin: str
    ignored: str = ""

    def __str__(self) -> str:
        return (
            f"rank {self.rank} of {self.world_size} ({self.origin}), local rank {self.local_rank}, rank 0 at "
            f"{self.master_addr}:{self.master_port}, according to {self.source}"
        )

    @property
    def launched(self) -> bool:
        """Whether there was a launcher to believe."""
        return self.source != ONE_PROCESS

    def variables(self) -> dict[str, str]:
        """As torchrun would have set them."""
        variables = {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }
        if self.local_world_size is not None:
            variables["LOCAL_WORLD_SIZE"] = str(self.local_world_size)
        return variables


@dataclass(frozen=True)
class Launcher:
    """The names of a launcher's variables. One process per machine where it has none for the local rank."""

    name: str
    rank: str
    world_size: str
    local_rank: str = ""
    local_world_size: str = ""

    def is_in(self, env: Environment) -> bool:
        return self.rank in env or self.world_size in env

    def numbers(self, env: Environment) -> tuple[int, int]:
        """(rank, world size)."""
        return integer(env, self.rank), integer(env, self.world_size)

    def describe(self, env: Environment) -> str:
        return f"{self.name} says {self.rank}={env[self.rank]}, {self.world_size}={env[self.world_size]}"


TORCHRUN = Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
DEEPSPEED = Launcher("DeepSpeed", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
PYTORCHJOB = Launcher("RANK and WORLD_SIZE, one process per machine", "RANK", "WORLD_SIZE")
INDEXED_JOB = Launcher("a Kubernetes indexed job", "JOB_COMPLETION_INDEX", "WORLD_SIZE")
OPEN_MPI = Launcher(
    "Open MPI",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
MPICH = Launcher("MPICH or Intel MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
MVAPICH2 = Launcher(
    "MVAPICH2",
    "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)
MPI = (OPEN_MPI, MPICH, MVAPICH2)
SLURM = Launcher("SLURM", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
# Of the step; with `srun --preserve-env` SLURM_NTASKS is the job's.
SLURM_STEP = Launcher("SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


def resolve_ranks(environ: Environment, configured: int) -> Ranks:
    """This process's place, according to `environ`. An empty variable counts as not set.

    configured: the processes that the configuration asks for. If it asks for one, only RANK and WORLD_SIZE can
        object: a plain command in the shell of a SLURM job, or the tasks of a sweep, do not wait for each other.

    Raises:
        ValueError: variables are missing, are no numbers, or contradict each other.
    """
    env = {name: value.strip() for name, value in environ.items() if value.strip()}
    if env.get("WORLD_SIZE") == "1":
        env = ALONE | env
    missing = [name for name in REQUIRED if name not in env]
    if not missing:
        deepspeed = DEEPSPEED.local_world_size in env and TORCHRUN.local_world_size not in env
        return place(env, DEEPSPEED if deepspeed else TORCHRUN)
    told = [name for name in ("WORLD_SIZE", "RANK") if name in env]
    launcher = innermost(env)
    if not told and (launcher is None or configured == 1):
        return one_process(env, launcher)
    if launcher is not None:
        check_agreement(env, launcher)
        return place(env, launcher)
    if missing != ["LOCAL_RANK"]:
        raise ValueError(
            f"{told[0]}={env[told[0]]} but {', '.join(missing)} is not set; start the processes with torchrun, "
            "deepspeed, srun or mpirun, or set what is missing"
        )
    return place(env, PYTORCHJOB)


def innermost(env: Environment) -> Launcher | None:
    """Who started this process, those that set RANK aside."""
    mpi = next((each for each in MPI if each.is_in(env)), None)
    step = slurm_step(env)
    if mpi is not None:
        for other in MPI:
            if other.is_in(env) and other.numbers(env) != mpi.numbers(env):
                raise ValueError(
                    f"{mpi.describe(env)}, but {other.describe(env)}; unset the variables of the launcher that did "
                    "not start this process"
                )
        return step if step is not None and step.numbers(env) == mpi.numbers(env) else mpi
    # Somebody who sets RANK has made other ranks of the indices.
    if step is None and INDEXED_JOB.rank in env and "RANK" not in env:
        return INDEXED_JOB
    return step


def slurm_step(env: Environment) -> Launcher | None:
    if step_number(env) is None:
        return None
    return SLURM_STEP if SLURM_STEP.world_size in env else SLURM


def check_agreement(env: Environment, launcher: Launcher) -> None:
    """RANK and WORLD_SIZE, where only some of `REQUIRED` are set, say what `launcher` says."""
    rank, world_size = launcher.numbers(env)
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
        if name in env and integer(env, name) != value:
            raise ValueError(
                f"{name}={env[name]!r}, but {launcher.describe(env)}; unset {name}, or set all of "
                f"{', '.join(REQUIRED)}, which then count alone"
            )


def one_process(env: Environment, launcher: Launcher | None) -> Ranks:
    """Alone, whatever `launcher` says."""
    origin, ignored = "no launcher has set WORLD_SIZE", ""
    if launcher is not None and env.get(launcher.world_size, "1") != "1":
        ignored = f"{launcher.world_size}={env[launcher.world_size]}"
    elif "SLURM_JOB_ID" in env:
        origin = "in a SLURM job, but not as a task of srun"
    return Ranks(0, integer(env, "LOCAL_RANK", 0), 1, 1, LOOPBACK, DEFAULT_PORT, ONE_PROCESS, origin, ignored)


def place(env: Environment, launcher: Launcher) -> Ranks:
    """The place that `launcher` gives this process.

    Raises:
        ValueError: it is none.
    """
    rank, world_size = launcher.numbers(env)
    local_rank = integer(env, launcher.local_rank) if launcher.local_rank else 0
    local_world_size = local_size(env, launcher, world_size)
    if rank >= world_size:
        raise ValueError(
            f"{launcher.rank}={rank} but {launcher.world_size}={world_size}: ranks count from 0 to {world_size - 1}; "
            "start each process with a rank of its own, or unset variables that another launcher has left"
        )
    if local_world_size is not None and not local_rank < local_world_size <= world_size:
        raise ValueError(
            f"{launcher.local_rank}={local_rank} of {local_world_size} processes on this machine "
            f"({launcher.local_world_size}) and {launcher.world_size}={world_size} do not fit together: local ranks "
            "count from 0, and no machine has more processes than the run; unset what another launcher has left"
        )
    addr = master_addr(env, launcher, local_world_size == world_size)
    if is_loopback(addr) and local_world_size not in (None, world_size) and rank != local_rank:
        raise ValueError(
            f"MASTER_ADDR={addr!r} is this machine itself, but rank {rank} is number {local_rank} of "
            f"{local_world_size} here, so rank 0 is elsewhere; set MASTER_ADDR to the address of rank 0's machine, or "
            "LOCAL_RANK and LOCAL_WORLD_SIZE if all processes are on this one"
        )
    port = master_port(env, launcher)
    return Ranks(rank, local_rank, world_size, local_world_size, addr, port, launcher.name, launcher.world_size)


def local_size(env: Environment, launcher: Launcher, world_size: int) -> int | None:
    """How many processes this machine has."""
    if not launcher.local_rank:
        return 1
    if launcher.name == SLURM.name:
        return tasks_here(env, world_size)
    if launcher == TORCHRUN and launcher.local_world_size not in env:
        return None  # A script that stands in for torchrun.
    return integer(env, launcher.local_world_size)


def master_addr(env: Environment, launcher: Launcher, one_machine: bool) -> str:
    """Where rank 0 listens; `one_machine`: all processes are on this one."""
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"]
    if launcher.name == SLURM.name and (host := first_host(env)) is not None:
        return host
    if one_machine:
        return LOOPBACK
    raise ValueError(
        f"{launcher.world_size}={env[launcher.world_size]} on several machines, but MASTER_ADDR is not set, and "
        f"{launcher.name} does not say where rank 0 runs; set MASTER_ADDR to that machine's address for all processes "
        "(Open MPI: mpirun -x MASTER_ADDR=..., others: mpirun -genv MASTER_ADDR ...)"
    )


def master_port(env: Environment, launcher: Launcher) -> int:
    if "MASTER_PORT" in env:
        port = integer(env, "MASTER_PORT")
        if not 0 < port < 2**16:
            raise ValueError(f"MASTER_PORT={port} is not a port; choose one from 1024 to 65535 that is free on rank 0")
        return port
    if launcher.name == SLURM.name:
        return job_port(env)
    return DEFAULT_PORT


def is_loopback(addr: str) -> bool:
    """Whether every machine means itself by it."""
    try:
        return ipaddress.ip_address(addr).is_loopback
    except ValueError:
        return addr == "localhost"
