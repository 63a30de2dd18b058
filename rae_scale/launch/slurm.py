"""A batch script: one `rae-scale launch` per node under srun, and the same job once more when there is work left.

SLURM's signals (`--signal` before the time limit, preemption, scancel) reach the tasks of srun, not their children and
not the batch script: each node's `rae-scale launch` gets them and asks its training processes to stop.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rae_scale.launch.command import Submission
from rae_scale.launch.requeue import REQUEUE

TEMPLATE = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@{lead}
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
{options}#
{notes}
set -euo pipefail

# sbatch runs a copy of this file from its spool, so the checkout is where the job was submitted.
cd "$SLURM_SUBMIT_DIR"
{setting}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# A port of its own for each job, in case two share a node.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
# A signal that reaches this shell, too, must not end it before the job has been put back into the queue.
trap : TERM USR1

# --cpu-bind: a node's one task would else be bound to one core. --mpi=none: it is no MPI program. --wait: how long the
# other nodes may go on after the first has ended. After a stop all end together.
# SLURM_NODEID exists only inside the task, so it is expanded there.
ended=0
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 --wait=60 --mpi=none --cpu-bind=none --label --export=ALL \\
  bash -c 'exec "$PYTHON" -m rae_scale launch --with torchrun --nodes "$SLURM_JOB_NUM_NODES" \\
    --node-rank "$SLURM_NODEID"{processes} --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \\
    "$@"' launch {inner}-- {command} || ended=$?

# 75: stopped by a signal with everything saved, or failed after it had got on. Else it is done, or would fail again.
status=0
"$PYTHON" -m rae_scale.launch.requeue --restarts {restarts} --status "$ended" -- {command} || status=$?
if ((status == {requeue})); then
  echo "job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""

NOTES = """\
# One `rae-scale launch` per node. Before the time limit and on preemption it gets SIGTERM; the processes save and end,
# and the job is put back into the queue. It goes on from its newest checkpoint.
# Submit from the checkout, which every node must see under the same path:
#
#   sbatch launchers/slurm.sbatch train configs/run/pretrain-9.8b.yaml
#   sbatch --nodes=1 launchers/slurm.sbatch train configs/run/pretrain-2.4b.yaml
#
# `rae-scale launch --with slurm -- train ...` submits the same with sizes from the configuration and only the named
# variables; sbatch alone passes the whole environment."""
FIND_PYTHON = """\
# shellcheck source=launchers/common.sh
source launchers/common.sh"""


@dataclass(frozen=True)
class BatchJob:
    """
    command: None is what stands behind the script's name. gpus: on each node. lead_s: seconds between SIGTERM and the
    time limit. options: further ones of sbatch. processes: on each node; None is one for each GPU there.
    """

    command: tuple[str, ...] | None = None
    name: str = "rae-scale"
    nodes: int = 8
    gpus: int = 8
    processes: int | None = None
    lead_s: int = 300
    restarts: int = 3
    fit: bool = False
    preflight: bool = False
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None


def script(job: BatchJob) -> str:
    own = job.command is not None
    options = [*([f"--gpus-per-node={job.gpus}"] if job.gpus else []), *job.options]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    inner = [*(["--fit"] if job.fit else []), *(["--preflight"] if job.preflight else [])]
    return TEMPLATE.format(
        name=job.name,
        nodes=job.nodes,
        lead=job.lead_s,
        options="".join(f"#SBATCH {option}\n" for option in options),
        notes="# Written by `rae-scale launch --with slurm`." if own else NOTES,
        setting="\n".join([*exports, f"export PYTHON={shlex.quote(job.python)}" if job.python else FIND_PYTHON]),
        processes="" if job.processes is None else f" --processes {job.processes}",
        inner="".join(f"{word} " for word in inner),
        command='"$@"' if job.command is None else shlex.join(job.command),
        restarts=job.restarts,
        requeue=REQUEUE,
    )


def submission(job: BatchJob) -> Submission:
    return Submission(("sbatch",), script(job))
