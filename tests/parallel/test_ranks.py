from __future__ import annotations

from typing import Any

import pytest

from rae_scale.parallel.ranks import resolve_ranks
from rae_scale.parallel.slurm import expand_counts, expand_hosts

Env = dict[str, str]

ADDRESS = {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **ADDRESS}
STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "14",
    "SLURM_STEP_NUM_TASKS": "14",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8,6",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
MVAPICH2 = {
    "MV2_COMM_WORLD_RANK": "2",
    "MV2_COMM_WORLD_SIZE": "4",
    "MV2_COMM_WORLD_LOCAL_RANK": "0",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}
# What a batch script or a shell of salloc sees of a job with 8 tasks.
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "8"}
TASK_ZERO = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def without(env: Env, *names: str) -> Env:
    return {name: value for name, value in env.items() if name not in names}


# environment -> rank, world size, local rank, local world size, address, port, source
PLACES: dict[str, tuple[Env, tuple[Any, ...]]] = {
    "nothing": ({}, (0, 1, 0, 1, "127.0.0.1", 29500, "one process")),
    "torchrun": (TORCHRUN, (5, 8, 1, 4, "head", 1234, "torchrun")),
    "a script like torchrun": (without(TORCHRUN, "LOCAL_WORLD_SIZE"), (5, 8, 1, None, "head", 1234, "torchrun")),
    "deepspeed": (
        {**without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_SIZE": "4"},
        (5, 8, 1, 4, "head", 1234, "DeepSpeed"),
    ),
    "torchrun under srun": (STEP | TORCHRUN, (5, 8, 1, 4, "head", 1234, "torchrun")),
    "torchrun under mpirun": (OPEN_MPI | TORCHRUN, (5, 8, 1, 4, "head", 1234, "torchrun")),
    "one process under torchrun": (
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", **ADDRESS},
        (0, 1, 0, 1, "head", 1234, "torchrun"),
    ),
    "WORLD_SIZE=1 alone": ({"WORLD_SIZE": "1"}, (0, 1, 0, None, "127.0.0.1", 29500, "torchrun")),
    "WORLD_SIZE=1 in a step": (STEP | {"WORLD_SIZE": "1"}, (0, 1, 0, None, "127.0.0.1", 29500, "torchrun")),
    "srun": (STEP, (9, 14, 1, 6, "gpu08", 24567, "SLURM")),
    "srun, second step": (STEP | {"SLURM_STEP_ID": "2"}, (9, 14, 1, 6, "gpu08", 26561, "SLURM")),
    "srun with an address": (STEP | ADDRESS, (9, 14, 1, 6, "head", 1234, "SLURM")),
    "srun without a step's node list": (
        without(STEP, "SLURM_STEP_NODELIST"),
        (9, 14, 1, 6, "gpu07", 24567, "SLURM"),
    ),
    "srun without node lists": (
        without(STEP, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"),
        (9, 14, 1, 6, "10.0.0.1", 24567, "SLURM"),
    ),
    "srun --preserve-env": (STEP | {"SLURM_NTASKS": "64"}, (9, 14, 1, 6, "gpu08", 24567, "SLURM")),
    "older srun": (
        without(STEP, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")
        | {"SLURM_TASKS_PER_NODE": "7(x2)"},
        (9, 14, 1, 7, "gpu08", 24567, "SLURM"),
    ),
    "srun --ntasks-per-node": (
        without(STEP, "SLURM_STEP_TASKS_PER_NODE") | {"SLURM_NTASKS_PER_NODE": "7"},
        (9, 14, 1, 7, "gpu08", 24567, "SLURM"),
    ),
    "srun --mpi=pmi2": (STEP | {"PMI_RANK": "9", "PMI_SIZE": "14"}, (9, 14, 1, 6, "gpu08", 24567, "SLURM")),
    "srun, WORLD_SIZE from the script": (STEP | {"WORLD_SIZE": "14"}, (9, 14, 1, 6, "gpu08", 24567, "SLURM")),
    "srun, RANK and WORLD_SIZE from the script": (
        STEP | {"RANK": "9", "WORLD_SIZE": "14", **ADDRESS},
        (9, 14, 1, 6, "head", 1234, "SLURM"),
    ),
    "mpirun": (OPEN_MPI | ADDRESS, (3, 4, 1, 2, "head", 1234, "Open MPI")),
    "mpirun, default port": (OPEN_MPI | {"MASTER_ADDR": "head"}, (3, 4, 1, 2, "head", 29500, "Open MPI")),
    "mpirun in a SLURM job": (STEP | OPEN_MPI | ADDRESS, (3, 4, 1, 2, "head", 1234, "Open MPI")),
    "mpiexec on one machine": (MPICH, (3, 4, 3, 4, "127.0.0.1", 29500, "MPICH or Intel MPI")),
    "mvapich": (MVAPICH2 | ADDRESS, (2, 4, 0, 2, "head", 1234, "MVAPICH2")),
    "two that agree": (
        MVAPICH2 | {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"} | ADDRESS,
        (2, 4, 0, 2, "head", 1234, "MPICH or Intel MPI"),
    ),
    "indexed job": (
        {"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "head"},
        (3, 4, 0, 1, "head", 29500, "a Kubernetes indexed job"),
    ),
    "torchrun in an indexed job": (
        TORCHRUN | {"JOB_COMPLETION_INDEX": "1"},
        (5, 8, 1, 4, "head", 1234, "torchrun"),
    ),
    "PyTorchJob": (
        {"RANK": "1", "WORLD_SIZE": "4", **ADDRESS},
        (1, 4, 0, 1, "head", 1234, "RANK and WORLD_SIZE, one process per machine"),
    ),
    "PyTorchJob's master": (
        {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"},
        (0, 4, 0, 1, "localhost", 1234, "RANK and WORLD_SIZE, one process per machine"),
    ),
    "RANK that is not the index": (
        {"RANK": "1", "WORLD_SIZE": "4", "JOB_COMPLETION_INDEX": "0", **ADDRESS},
        (1, 4, 0, 1, "head", 1234, "RANK and WORLD_SIZE, one process per machine"),
    ),
    "empty variables": (dict.fromkeys(TORCHRUN, " "), (0, 1, 0, 1, "127.0.0.1", 29500, "one process")),
}


@pytest.mark.parametrize(("env", "expected"), PLACES.values(), ids=PLACES.keys())
def test_place(env: Env, expected: tuple[Any, ...]) -> None:
    ranks = resolve_ranks(env, configured=expected[1])
    assert expected == (
        ranks.rank,
        ranks.world_size,
        ranks.local_rank,
        ranks.local_world_size,
        ranks.master_addr,
        ranks.master_port,
        ranks.source,
    )
    assert ranks.launched == (ranks.source != "one process")


@pytest.mark.parametrize("name", [name for name, (_, place) in PLACES.items() if place[1] > 1])
def test_what_is_written_back_is_understood_the_same(name: str) -> None:
    env, expected = PLACES[name]
    ranks = resolve_ranks(env, expected[1])
    again = resolve_ranks(env | ranks.variables(), expected[1])
    assert again.variables() == ranks.variables()


IN_A_JOB: dict[str, Env] = {
    "salloc, on the login node": BATCH,
    "salloc, interactive step by name": BATCH | TASK_ZERO | {"SLURM_STEP_ID": "interactive"},
    "salloc, interactive step by number": BATCH | TASK_ZERO | {"SLURM_STEP_ID": "4294967290"},
    "batch script": BATCH | TASK_ZERO,
    "batch script, step by name": BATCH | TASK_ZERO | {"SLURM_STEP_ID": "batch"},
    "batch script, step by number": BATCH | TASK_ZERO | {"SLURM_STEP_ID": "4294967291"},
}


@pytest.mark.parametrize("env", IN_A_JOB.values(), ids=IN_A_JOB.keys())
@pytest.mark.parametrize("configured", [1, 8])
def test_a_shell_in_a_slurm_job_is_one_process_and_waits_for_nobody(env: Env, configured: int) -> None:
    ranks = resolve_ranks(env, configured)
    assert (ranks.rank, ranks.world_size, ranks.launched, ranks.ignored) == (0, 1, False, "")
    assert ranks.origin == "in a SLURM job, but not as a task of srun"


@pytest.mark.parametrize(
    ("env", "ignored"),
    [
        (STEP, "SLURM_STEP_NUM_TASKS=14"),
        (OPEN_MPI, "OMPI_COMM_WORLD_SIZE=4"),
        (MPICH | {"PMI_RANK": "0", "PMI_SIZE": "1"}, ""),
        ({"JOB_COMPLETION_INDEX": "3"}, ""),
    ],
)
def test_whoever_asks_for_one_process_gets_one_and_is_told_what_is_ignored(env: Env, ignored: str) -> None:
    ranks = resolve_ranks(env, configured=1)
    assert (ranks.rank, ranks.world_size, ranks.launched, ranks.ignored) == (0, 1, False, ignored)


def test_world_size_counts_even_when_one_process_is_asked_for() -> None:
    assert resolve_ranks(TORCHRUN, configured=1).world_size == 8


MISTAKES: dict[str, tuple[Env, str]] = {
    "rank out of range": (TORCHRUN | {"RANK": "8"}, r"^RANK=8 but WORLD_SIZE=8: ranks count from 0 to 7;"),
    "rank of one": ({"RANK": "1", "WORLD_SIZE": "1"}, r"^RANK=1 but WORLD_SIZE=1"),
    "no integer": (TORCHRUN | {"RANK": "five"}, r"^RANK='five' is not a whole number"),
    "negative": (TORCHRUN | {"LOCAL_RANK": "-1"}, r"^LOCAL_RANK='-1' is not a whole number"),
    "no processes": (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "0"}, r"^RANK=0 but WORLD_SIZE=0"),
    "local rank out of range": (TORCHRUN | {"LOCAL_RANK": "4"}, r"^LOCAL_RANK=4 of 4 .*LOCAL_WORLD_SIZE"),
    "more here than anywhere": (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, r"^LOCAL_RANK=1 of 9 .* and WORLD_SIZE=8 do not"),
    "no port": (without(TORCHRUN, "MASTER_PORT"), r"^WORLD_SIZE=8 but MASTER_PORT is not set; start.*torchrun"),
    "impossible port": (TORCHRUN | {"MASTER_PORT": "70000"}, r"^MASTER_PORT=70000 is not a port"),
    "only a rank": ({"RANK": "0"}, r"^RANK=0 but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
    "no local rank on one machine": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"},
        r"^MASTER_ADDR='127.0.0.1' is this machine itself, but rank 1 is number 0 of 1 .* LOCAL_RANK",
    ),
    "loopback over machines": (TORCHRUN | {"MASTER_ADDR": "localhost"}, r"^MASTER_ADDR='localhost' .*rank 0 is else"),
    "script against srun": (
        STEP | {"WORLD_SIZE": "28"},
        r"^WORLD_SIZE='28', but SLURM says SLURM_PROCID=9, SLURM_STEP_NUM_TASKS=14; unset WORLD_SIZE, or set all",
    ),
    "rank against srun": (STEP | {"RANK": "2", "WORLD_SIZE": "14", **ADDRESS}, r"^RANK='2', but SLURM says .*PROCID=9"),
    "two that disagree": (
        OPEN_MPI | MPICH | {"PMI_RANK": "0"},
        r"^Open MPI says OMPI_COMM_WORLD_RANK=3, .*=4, but MPICH or Intel MPI says PMI_RANK=0, PMI_SIZE=4; unset",
    ),
    "tasks do not add up": (
        STEP | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"},
        r"^SLURM_STEP_TASKS_PER_NODE='8\(x2\)' adds up to 16 tasks, but there are 14;",
    ),
    "tasks of a list that is none": (
        STEP | {"SLURM_STEP_TASKS_PER_NODE": "8x2"},
        r"^SLURM_STEP_TASKS_PER_NODE: '8x2' is not a list of tasks",
    ),
    "machine out of the list": (STEP | {"SLURM_NODEID": "2"}, r"^SLURM_NODEID=2, but .*='8,6' is of 2 machines"),
    "no tasks per machine": (without(STEP, "SLURM_STEP_TASKS_PER_NODE"), r"^SLURM_NTASKS_PER_NODE is not set"),
    "bad node list": (STEP | {"SLURM_STEP_NODELIST": "gpu[1-"}, r"^SLURM_STEP_NODELIST: 'gpu\[1-' .* set MASTER_ADDR"),
    "no task number": (without(STEP, "SLURM_LOCALID"), r"^SLURM_LOCALID is not set"),
    "mpirun without an address": (OPEN_MPI, r"^OMPI_COMM_WORLD_SIZE=4 on several machines, but MASTER_ADDR is not set"),
    "half of Open MPI": (without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"), r"^OMPI_COMM_WORLD_RANK is not set"),
    "no local rank of MPICH": (without(MPICH, "MPI_LOCALRANKID"), r"^MPI_LOCALRANKID is not set"),
    "indexed job without a size": ({"JOB_COMPLETION_INDEX": "0"}, r"^WORLD_SIZE is not set"),
    "indexed job without an address": (
        {"JOB_COMPLETION_INDEX": "0", "WORLD_SIZE": "2"},
        r"^WORLD_SIZE=2 on several machines, but MASTER_ADDR is not set, and a Kubernetes indexed job does not say",
    ),
}


@pytest.mark.parametrize(("env", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named(env: Env, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_ranks(env, configured=8)


def test_ports_of_jobs_stay_below_those_of_outgoing_connections() -> None:
    ports = {resolve_ranks(STEP | {"SLURM_JOB_ID": str(job)}, 14).master_port for job in range(65_500, 85_500)}
    assert (min(ports), max(ports), len(ports)) == (20_000, 29_999, 10_000)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[001-003,007],gpu-[1-2]", ["node001", "node002", "node003", "node007", "gpu-1", "gpu-2"]),
        ("a,b.example.org,c-[9-11]", ["a", "b.example.org", "c-9", "c-10", "c-11"]),
        ("n[08-10]-ib", ["n08-ib", "n09-ib", "n10-ib"]),
        ("r[1-2]n[0,3]", ["r1n0", "r1n3", "r2n0", "r2n3"]),
    ],
)
def test_host_list(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "a,", ",a", "a,,b", "a b", "n[1-2", "n1]", "n[]", "n[2-1]", "n[a-b]", "n[1,,2]"])
def test_what_is_no_host_list(text: str) -> None:
    with pytest.raises(ValueError, match="host list"):
        expand_hosts(text)


def test_counts() -> None:
    assert expand_counts("8(x4),6") == [8, 8, 8, 8, 6]
    assert expand_counts("2,1(x2),3") == [2, 1, 1, 3]
    for text in ("", "8(x)", "8x4", "8,,6", "-1"):
        with pytest.raises(ValueError, match="list of tasks per host"):
            expand_counts(text)
