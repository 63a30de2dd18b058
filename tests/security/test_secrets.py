"""Secrets in the environment reach no log, no saved file and no printed command.

What `rae-scale launch` passes on is in tests/launch; here every one of its ways prints what it would execute.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from rae_scale.cli.main import main
from rae_scale.config import dump_config
from tests.train.tiny_world import make_world

# The last ones have the beginnings of names that are passed on to other machines.
NAMES = (
    "WANDB_API_KEY",
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "MY_PASSWORD",
    "MLFLOW_TRACKING_PASSWORD",
    "NCCL_SECRET",
    "PYTHON_KEYRING_PASS",
)
SECRETS = {name: f"canary-{number}-7f3a9c" for number, name in enumerate(NAMES)}
# A password within an address has no telling name.
ADDRESS_PASSWORD = "canary-address-7f3a9c"
SECRETS["RAE_PROXY"] = f"http://user:{ADDRESS_PASSWORD}@proxy:3128"
CANARIES = [value.encode() for name, value in SECRETS.items() if name != "RAE_PROXY"] + [ADDRESS_PASSWORD.encode()]

WAYS = {
    "torchrun": ["--hostfile", "HOSTS"],
    "deepspeed": ["--hostfile", "HOSTS"],
    "slurm": ["--nodes", "2", "--processes", "1"],
    "kubernetes": ["--nodes", "2", "--processes", "1", "--image", "rae-scale"],
    "docker": ["--processes", "2", "--image", "rae-scale"],
    "compose": ["--nodes", "2", "--processes", "1", "--image", "rae-scale"],
    "mpi": ["--hostfile", "HOSTS", "--mpi", "openmpi"],
}


def leaks(text: str | bytes) -> list[bytes]:
    data = text.encode() if isinstance(text, str) else text
    return [canary for canary in CANARIES if canary in data]


@pytest.fixture
def rae(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Callable[..., str]:
    """Run a rae-scale command with the secrets in its environment; all that it has printed, logged and raised."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAE_TRACEBACK", "")  # --traceback sets it

    def run(*command: object) -> str:
        monkeypatch.setattr(sys, "argv", ["rae-scale", *map(str, command)])
        raised = ""
        try:
            main()
        except (SystemExit, ValueError):
            raised = traceback.format_exc()
        printed = capfd.readouterr()
        return printed.out + printed.err + caplog.text + raised

    return run


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    world = make_world(tmp_path_factory.mktemp("world"))
    settings = {"run__max_steps": 2, "run__save_every": 1, "run__tensorboard": True, "run__log_every": 1}
    (folder / "run.yaml").write_text(dump_config(world.config(folder / "run", **settings)))
    return folder / "run.yaml"


def test_training_keeps_them(rae: Callable[..., str], run_file: Path) -> None:
    """Also one that fails with a traceback."""
    said = rae("train", run_file)
    assert "step" in said
    failed = rae("--traceback", "train", run_file, "run.resume=never")
    assert "Traceback" in failed and "run.resume=never, but" in failed
    assert not leaks(said + failed)
    files = [path for path in (run_file.parent / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "version.json", "state.json", "metrics.jsonl"} <= {path.name for path in files}
    assert {path: found for path in files if (found := leaks(path.read_bytes()))} == {}


def test_preflight_keeps_them(rae: Callable[..., str], run_file: Path) -> None:
    said = rae("preflight", run_file, "--json")
    assert '"checks"' in said or '"findings"' in said, said
    assert not leaks(said)


@pytest.mark.parametrize("way", WAYS)
def test_a_printed_launch_has_none(way: str, rae: Callable[..., str], tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=1\nb slots=1\n")
    given = [str(hosts) if word == "HOSTS" else word for word in WAYS[way]]
    said = rae("launch", "--with", way, *given, "--dry-run", "--", "train", "configs/run/demo.yaml")
    assert "configs/run/demo.yaml" in said and "rae-scale: error" not in said, said
    assert not leaks(said), said
    if way == "deepspeed":
        # Its launcher passes what begins so by itself, on the command line of ssh: it must not have it.
        for name in ("MLFLOW_TRACKING_PASSWORD", "NCCL_SECRET", "PYTHON_KEYRING_PASS"):
            assert f" {name}= " in said
