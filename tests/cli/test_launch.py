"""`rae-scale launch`: what --dry-run prints, and what is executed without it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = "configs/run/demo.yaml"
ROOT = Path(__file__).resolve().parents[2]
Rae = Callable[..., str]


def test_a_dry_run_prints_a_script_and_runs_nothing(rae: Rae, tmp_path: Path) -> None:
    run = tmp_path / "run"
    printed = rae("launch", "--dry-run", "--processes", 2, "--", "train", CONFIG, f"run.dir={run}", "run.seed=5")
    comment, command = printed.splitlines()
    assert comment == "# node 0 of 1: localhost, 2 process(es)"
    assert command.endswith(f"-m rae_scale train {CONFIG} run.dir={run} run.seed=5")
    assert not run.exists()


def test_what_is_printed_is_what_is_executed(rae: Rae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The printed line, run by bash, and the launch itself start a program with the same words and variables."""
    program = tmp_path / "mpirun"
    program.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # the launch below has none either
    options = ["--with", "mpi", "--mpi", "openmpi", "--master-port", "31997", "--env", "ODD=a 'b' $c"]
    command = ["--processes", "1", "--", "data", "shapes", "--out", "two words"]
    printed = rae("launch", *options, "--dry-run", *command)
    by_bash = subprocess.run(["bash", "-c", printed], capture_output=True, text=True, check=True).stdout
    launched = subprocess.run(
        [sys.executable, "-m", "rae_scale", "launch", *options, *command],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    ).stdout
    assert "ODD=a 'b' $c" in by_bash and "two words" in by_bash
    assert launched == by_bash


def test_options_of_the_command_are_its_own(rae: Rae) -> None:
    printed = rae("launch", "--dry-run", "--processes", 2, "train", CONFIG, "--dry-run")
    assert printed.endswith(f"train {CONFIG} --dry-run\n")


def test_held_back_secrets_are_named(
    rae: Rae, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    monkeypatch.setattr(sys, "argv", ["rae-scale", "launch", "--with", "slurm", "--dry-run", "--", "train", CONFIG])
    from rae_scale.cli.main import main

    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/usr/bin/env bash\n")
    assert "not passed on, since they look like secrets:" in printed.err and "HF_TOKEN" in printed.err
    assert "canary" not in printed.out + printed.err


def test_manifests_are_printed_as_they_are(rae: Rae) -> None:
    printed = rae("launch", "--with", "kubernetes", "--kind", "job", "--image", "i", "--dry-run", "--", "train", CONFIG)
    assert printed.startswith("---\napiVersion: v1\nkind: Service\n")


@pytest.mark.parametrize(("launcher", "program"), [("slurm", "sbatch"), ("kubernetes", "kubectl"), ("mpi", "mpirun")])
def test_a_missing_program_is_named(
    rae: Rae, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launcher: str, program: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    told = rae("launch", "--with", launcher, "--image", "i", "--", "train", CONFIG, status=2)
    assert f"error: {program} is not on this machine; " in told


def test_sbatch_is_given_what_a_dry_run_prints(rae: Rae, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "sbatch"
    program.write_text(f"#!/bin/sh\ncat > {tmp_path}/submitted\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    options = ["launch", "--with", "slurm", "--master-port", "31997"]
    printed = rae(*options, "--dry-run", "--", "train", CONFIG)
    rae(*options, "--", "train", CONFIG, status=3)
    assert (tmp_path / "submitted").read_text() == printed


def test_restarts_need_a_command_that_resumes(rae: Rae) -> None:
    told = rae("launch", "--restarts", 1, "--", "data", "shapes", status=2)
    assert "--restarts needs a command that goes on where it stopped" in told


def test_this_machine_must_be_one_of_the_nodes(rae: Rae) -> None:
    options = ["--nodes", 2, "--processes", 1, "--master-addr", "127.0.0.1"]
    told = rae("launch", *options, "--", "train", CONFIG, status=2)
    assert "this machine is one of 2; say which with --node-rank" in told


def test_fit(rae: Rae) -> None:
    printed = rae("launch", "--fit", "--processes", 4, "--dry-run", "--", "train", CONFIG)
    assert "--nproc-per-node 4" in printed and printed.endswith("parallel.dp_shard=4\n")


def test_launching_needs_no_torch() -> None:
    script = (
        f"import sys; sys.argv = ['rae-scale', 'launch', '--dry-run', '--', 'train', '{CONFIG}']\n"
        "from rae_scale.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "import rae_scale.launch.execute\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=ROOT)
