"""A real training under torchrun: killed, stopped, and left by its launch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from rae_scale.launch.processes import MARK, Process, environment, workers
from tests.launch.conftest import ROOT
from tests.train.tiny_world import make_world

pytestmark = [pytest.mark.long, pytest.mark.dist]

TIMEOUT = 240
STEPS = 12


class Run:
    def __init__(self, folder: Path) -> None:
        tree = make_world(folder).tree(folder / "run", engine__name="fsdp2", parallel__dp_shard=2)
        tree["run"] |= {"max_steps": STEPS, "save_every": 2}
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(tree))
        self.dir = folder / "run"
        self.temporary = folder / "temporary"
        self.temporary.mkdir()

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "rae_scale", "launch", *options, "--", "train", str(self.config)]
        variables = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        return subprocess.Popen(command, cwd=ROOT, env=variables)

    def status(self) -> dict[str, object]:
        return json.loads((self.dir / "status.json").read_text())

    def has_saved(self) -> bool:
        return (self.dir / "checkpoints" / "latest").exists()

    def processes(self) -> list[int]:
        numbers = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
        return [number for number in numbers if environment(number).get(MARK, "").endswith(str(self.dir))]

    def workers(self, launch: subprocess.Popen[bytes]) -> list[Process]:
        return workers(launch.pid)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Nothing of it may be left: no process, no temporary file, no shared memory."""
    before = set(os.listdir("/dev/shm"))
    run = Run(tmp_path)
    yield run
    wait_until(lambda: run.processes() == [])
    assert [path.name for path in run.temporary.iterdir() if not path.name.startswith("torchinductor_")] == []
    assert {name for name in set(os.listdir("/dev/shm")) - before if not name.startswith("sem.")} == set()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_rank_and_a_stop(run: Run) -> None:
    with run.start("--restarts", "2") as launch:
        wait_until(run.has_saved)
        os.kill(run.workers(launch)[1].pid, signal.SIGKILL)
        assert launch.wait(TIMEOUT) == 0
    assert (run.status()["state"], run.status()["step"], run.status()["attempt"]) == ("finished", STEPS, 2)
    assert run.start().wait(TIMEOUT) == 0, "a finished run has nothing left to do"


def test_a_stop_is_75_and_the_same_command_goes_on(run: Run) -> None:
    with run.start() as launch:
        wait_until(run.has_saved)
        launch.send_signal(signal.SIGUSR1)
        launch.send_signal(signal.SIGTERM)
        assert launch.wait(TIMEOUT) == 75
    assert run.status()["state"] == "requeue"
    assert run.start().wait(TIMEOUT) == 0
    assert run.status()["state"] == "finished"


def test_a_killed_launch_leaves_nothing_that_the_next_one_does_not_clear(run: Run) -> None:
    with run.start() as launch:
        wait_until(run.has_saved)
        launch.kill()
        launch.wait()
    # Its processes die with it: torchrun as its child, the ranks as torchrun's.
    wait_until(lambda: run.processes() == [])
    assert run.start().wait(TIMEOUT) == 0
    assert run.status()["state"] == "finished"
