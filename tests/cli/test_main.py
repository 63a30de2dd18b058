"""The command as a whole: quick help, clean errors, and what launchers pass along."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rae_scale.cli import main as cli
from rae_scale.cli.main import is_for_the_user, main

HEAVY = ("torch", "numpy", "transformers", "deepspeed", "diffusers", "pydantic", "yaml", "PIL", "scipy", "streaming")
CONFIG = "stage: pretrain\nrun: {max_steps: 3}\n"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (cli.TRACEBACK_VARIABLE, "WORLD_SIZE", "RANK"):
        # Set first: monkeypatch then also removes what --traceback sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["rae-scale", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with the same import path."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, check=False)


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from rae_scale.cli.main import main
sys.argv = ["rae-scale", "--help"]
try:
    main()
except SystemExit:
    print("heavy:", *[name for name in {HEAVY!r} if name in sys.modules])
"""
    done = python("-c", code)
    assert "Commands" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_help_answers_within_half_a_second() -> None:
    def processor_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def once() -> float:
        started = processor_seconds()
        python("-m", "rae_scale", "--help")
        return processor_seconds() - started

    # Processor time and the best of three, so that other work on the machine hardly counts.
    assert min(once() for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    "command",
    [
        ["train"],
        ["sample"],
        ["reconstruct"],
        ["data", "build"],
        ["data", "inspect"],
        ["data", "shapes"],
        ["data", "tokenizer"],
        ["model", "list"],
        ["model", "layout"],
        ["eval", "shapes"],
        ["checkpoint", "inspect"],
        ["checkpoint", "verify"],
        ["checkpoint", "export"],
    ],
)
def test_every_command_has_help(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *command, "--help") == 0
    assert " ".join(command) in capsys.readouterr().out


def test_a_users_error_is_one_clean_message(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", run_file, "run.max_stepz=3") == 2
    error = capsys.readouterr().err
    assert error == f"rae-scale: error: {run_file}: unknown key 'run.max_stepz': did you mean 'max_steps'?\n"


def test_the_rank_is_named_when_there_are_several(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(monkeypatch, "train", run_file, "x=1") == 2
    assert capsys.readouterr().err.startswith("rae-scale: error (rank 1): ")


def test_traceback_shows_where_an_error_comes_from(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rae-scale", "--traceback", "train", str(run_file), "x=1"])
    with pytest.raises(ValueError, match="unknown key 'x'"):
        main()


def test_the_traceback_variable_does_the_same(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    monkeypatch.setattr(sys, "argv", ["rae-scale", "train", str(run_file), "x=1"])
    with pytest.raises(ValueError, match="unknown key 'x'"):
        main()


def test_an_error_inside_a_library_keeps_its_traceback() -> None:
    try:
        __import__("json").loads("{")
    except ValueError as error:
        assert not is_for_the_user(error)


def test_a_missing_file_is_the_users(tmp_path: Path) -> None:
    try:
        (tmp_path / "nothing").read_bytes()
    except OSError as error:
        assert is_for_the_user(error)


def test_the_deepspeed_launchers_argument_is_accepted(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--local_rank=1", "train", run_file, "--print-config") == 0
    assert "max_steps: 3" in capsys.readouterr().out


def test_it_runs_as_a_module(run_file: Path) -> None:
    done = python("-m", "rae_scale", "train", str(run_file), "nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("rae-scale: error: override 'nonsense'")
