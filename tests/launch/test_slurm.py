"""The batch script: the one in launchers/, its syntax, and what it does with how the run has ended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rae_scale.launch.slurm import BatchJob, script
from tests.launch.conftest import ROOT, Write, write_status

SHELL_FILES = [*sorted((ROOT / "launchers").glob("*.sh")), ROOT / "launchers" / "slurm.sbatch"]
OWN = BatchJob(
    ("train", "x.yaml", "run.sample_prompts=['a b']"),
    nodes=2,
    gpus=4,
    processes=4,
    options=("--export=NONE", "--time=1:00:00"),
    environment={"NCCL_DEBUG": "INFO", "ODD": "a 'b' c"},
    fit=True,
    python=sys.executable,
)


def test_the_file_in_launchers_is_what_is_submitted() -> None:
    assert (ROOT / "launchers" / "slurm.sbatch").read_text() == script(BatchJob())


@pytest.mark.parametrize("name", [*(path.name for path in SHELL_FILES), "submitted"])
def test_shellcheck(name: str, tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck: pip install '.[dev]' brings it")
    (tmp_path / "submitted").write_text(script(OWN))
    path = tmp_path / name if name == "submitted" else ROOT / "launchers" / name
    found = subprocess.run([shellcheck, "-x", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_directives() -> None:
    text = script(OWN)
    for line in ("--nodes=2", "--gpus-per-node=4", "--signal=TERM@300", "--requeue", "--export=NONE", "--time=1:00:00"):
        assert f"#SBATCH {line}\n" in text
    assert "--gpus-per-node" not in script(BatchJob(gpus=0))


# Each records its arguments; srun ends as it is told to.
PROGRAMS = {
    "srun": 'printf "%s\\n" "$@" > srun.args; cp env.in env.out 2>/dev/null; env > srun.env; exit "$SRUN_STATUS"',
    "scontrol": 'if [[ $1 == show ]]; then echo first; echo second; else echo "$@" >> scontrol.args; fi',
}


def submit(tmp_path: Path, job: BatchJob, status: int) -> tuple[int, str]:
    """Exit status of the batch script, and what it asked scontrol for, when srun ends with `status`."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name, body in PROGRAMS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "job.sbatch").write_text(script(job))
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "gpu-[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SRUN_STATUS": str(status),
    }
    done = subprocess.run(
        ["bash", tmp_path / "job.sbatch"], env=environment, capture_output=True, text=True, check=False
    )
    asked = tmp_path / "scontrol.args"
    return done.returncode, asked.read_text() if asked.exists() else ""


def job_of(run_file: Write) -> BatchJob:
    return BatchJob(("train", str(run_file())), restarts=1, python=sys.executable, environment={"ODD": "a 'b' $c"})


@pytest.mark.parametrize(
    ("status", "state", "expected", "asked"),
    [
        (0, "finished", 0, ""),
        (75, "requeue", 75, "requeue 12345\n"),
        (1, "failed", 75, "requeue 12345\n"),
        (2, "finished", 75, "requeue 12345\n"),
    ],
)
def test_back_into_the_queue(
    tmp_path: Path, run_file: Write, status: int, state: str, expected: int, asked: str
) -> None:
    write_status(tmp_path / "run", state, 3)
    assert submit(tmp_path, job_of(run_file), status) == (expected, asked)


def test_not_for_ever(tmp_path: Path, run_file: Write) -> None:
    write_status(tmp_path / "run", "failed", 3)
    ended = [submit(tmp_path, job_of(run_file), 9) for _ in range(3)]
    # The first got further than any before, the second is the one restart, then it is over.
    assert [status for status, _ in ended] == [75, 9, 9]


def test_srun_gets_one_launch_per_node_and_the_variables(tmp_path: Path, run_file: Write) -> None:
    write_status(tmp_path / "run", "finished", 9)
    job = job_of(run_file)
    submit(tmp_path, job, 0)
    words = (tmp_path / "srun.args").read_text().split("\n")
    assert "--kill-on-bad-exit=0" in words and "--cpu-bind=none" in words
    inner = (tmp_path / "srun.args").read_text()
    assert '--node-rank "$SLURM_NODEID"' in inner
    assert job.command is not None
    assert inner.endswith("\n--\n" + "\n".join(job.command) + "\n")
    passed = dict(line.partition("=")[::2] for line in (tmp_path / "srun.env").read_text().splitlines())
    assert (passed["ODD"], passed["MASTER_ADDR"], passed["MASTER_PORT"]) == ("a 'b' $c", "first", "22345")
