"""What SLURM tells the tasks of a step, and its short forms for hosts and for tasks per host, written out."""

from __future__ import annotations

import itertools
import re

from rae_scale.parallel.variables import Environment, integer

# Below the ports that Linux gives to outgoing connections, 32768 and up. `launchers/slurm.sbatch` uses the same.
PORTS = range(20000, 30000)
# Slurm numbers its batch, interactive and extern steps from here: SLURM_MAX_NORMAL_STEP_ID in slurm.h.
FIRST_SPECIAL_STEP = 0xFFFFFFF0
# What may stand between two commas of a host list: text and any number of [...] in it.
HOST = re.compile(r"(?:[^\[\],\s]|\[[^\[\]]*\])+")
COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def step_number(env: Environment) -> int | None:
    """The step that this process is a task of, started by srun; None outside.

    A batch script and the shell of salloc have SLURM_PROCID, SLURM_LOCALID and the job's SLURM_NTASKS, too, but run
    once only.
    """
    step = env.get("SLURM_STEP_ID", "")
    if "SLURM_PROCID" not in env or not step.isdecimal() or int(step) >= FIRST_SPECIAL_STEP:
        return None
    return int(step)


def tasks_here(env: Environment, world_size: int) -> int:
    """The tasks on this machine, of `world_size` in the step."""
    # What is, of the step before the job's; then what was asked for.
    name = next((name for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if name in env), None)
    if name is None:
        return min(integer(env, "SLURM_NTASKS_PER_NODE"), world_size)
    try:
        counts = expand_counts(env[name])
    except ValueError as error:
        raise ValueError(f"{name}: {error}; start with srun, which sets it") from error
    if sum(counts) != world_size:
        raise ValueError(
            f"{name}={env[name]!r} adds up to {sum(counts)} tasks, but there are {world_size}; start with srun without "
            "--preserve-env, which sets it"
        )
    node = integer(env, "SLURM_NODEID") if len(set(counts)) > 1 else 0
    if node >= len(counts):
        raise ValueError(
            f"SLURM_NODEID={node}, but {name}={env[name]!r} is of {len(counts)} machines, from 0; start with srun "
            "without --preserve-env, which sets both"
        )
    return counts[node]


def first_host(env: Environment) -> str | None:
    """Where task 0 runs."""
    name = next((name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if name in env), None)
    if name is None:
        # Last: it is where srun was typed, which can be a login node, where no task 0 listens.
        return env.get("SLURM_LAUNCH_NODE_IPADDR")
    try:
        return expand_hosts(env[name])[0]
    except ValueError as error:
        raise ValueError(f"{name}: {error}; set MASTER_ADDR to the machine of task 0") from error


def job_port(env: Environment) -> int:
    """Another one for every job and for every step of it, which may share the machine of task 0."""
    return PORTS[(integer(env, "SLURM_JOB_ID") + 997 * integer(env, "SLURM_STEP_ID")) % len(PORTS)]


def expand_hosts(text: str) -> list[str]:
    """The hosts of `text`, in order: "node[08-10,12],gpu-1" is node08, node09, node10, node12, gpu-1.

    Raises:
        ValueError: `text` is no host list.
    """
    hosts: list[str] = []
    end = -1
    for match in HOST.finditer(text):
        # One comma, and nothing else, between two of them.
        if match.start() != end + 1 or (end >= 0 and text[end] != ","):
            break
        end = match.end()
        parts = re.split(r"\[([^\[\]]*)\]", match.group())
        # Every second part was in brackets.
        choices = [expand_numbers(part, text) if inside % 2 else [part] for inside, part in enumerate(parts)]
        hosts += map("".join, itertools.product(*choices))
    if end != len(text):
        raise ValueError(f"{text!r} is not a host list such as node[001-004,007],gpu-1")
    return hosts


def expand_numbers(text: str, hosts: str) -> list[str]:
    """ "08-10,12" is 08, 09, 10, 12: as many digits as the lower end has. `hosts`: where it stands, for the message."""
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ValueError(f"[{text}] in the host list {hosts!r} is not of the form [001-004,007]")
        low, high = match[1], match[2] or match[1]
        numbers += [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    return numbers


def expand_counts(text: str) -> list[int]:
    """The tasks of each host: "8(x3),6" is 8, 8, 8, 6.

    Raises:
        ValueError: `text` is not of that form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = COUNT.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a list of tasks per host such as 8(x4),6")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
