"""A supervised launch ends as the run's folder says, starts again while it gets on, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rae_scale.launch.processes import MARK, environment
from tests.launch.conftest import ROOT

SUPERVISED = Path(__file__).with_name("supervised.py")
TIMEOUT = 30

# Shell functions of the commands: `status STATE STEP` as a training writes it, one attempt later each time.
FUNCTIONS = r"""
status() {
  printf '{"state": "%s", "step": %d, "max_steps": 9, "reason": "", "attempt": %d}' "$1" "$2" "$(cat attempt)" > new
  mv new status.json
}
begin() { echo $(($(cat attempt 2>/dev/null || echo 0) + 1)) > attempt; status running "$1"; }
"""
# A worker as a launcher starts it: told its rank. It saves when it is asked to.
WORKER = """
export LOCAL_RANK=0
exec bash -c "$FUNCTIONS"'
trap "echo asked >> asked; status requeue 4; exit 0" TERM
echo started; begin 3
while :; do sleep 0.02; done'
"""


class Supervised:
    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder, self.process = folder, process

    def wait_for(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not happened():
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def wait_for_file(self, name: str) -> None:
        self.wait_for((self.folder / name).exists)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, out, err


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of the run. No process of it may be left at the end."""
    yield tmp_path
    assert left(tmp_path) == []


def left(folder: Path) -> list[int]:
    """Processes that were started for `folder`."""
    numbers = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [number for number in numbers if environment(number).get(MARK, "").endswith(str(folder))]


@contextmanager
def supervised(
    folder: Path, *scripts: str, restarts: int = 0, grace: float = 20, stop_by: str = "WORKERS"
) -> Iterator[Supervised]:
    command = [sys.executable, str(SUPERVISED), str(folder), str(restarts), str(grace), stop_by]
    wrapped = [f'cd {folder}; export FUNCTIONS={quoted(FUNCTIONS)}; eval "$FUNCTIONS"; {script}' for script in scripts]
    with subprocess.Popen(
        [*command, *wrapped],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        try:
            yield Supervised(folder, process)
        finally:
            process.kill()


def quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def run(folder: Path, *scripts: str, restarts: int = 0) -> tuple[int, str, str]:
    with supervised(folder, *scripts, restarts=restarts) as process:
        return process.end()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("begin 0; status finished 9", 0),
        # torchrun ends with 1 after a stop that saved everything.
        ("begin 0; status requeue 4; exit 1", 75),
        ("begin 0; status failed 4; exit 1", 1),
        ("begin 0; kill -9 $$", 137),
        ("exit 3", 3),
        ("exit 0", 0),
    ],
)
def test_the_exit_status_is_what_the_folder_says(folder: Path, script: str, expected: int) -> None:
    assert run(folder, script)[0] == expected


def test_output_is_on_the_terminal_and_in_the_log(folder: Path) -> None:
    status, out, err = run(folder, "echo step 1; echo warning >&2; begin 0; status finished 9")
    assert (status, out) == (0, "step 1\n")
    assert "warning\n" in err
    (log,) = (folder / "logs").glob("node-*.log")
    assert sorted(log.read_text().split("\n")) == ["", "step 1", "warning"]


def test_it_starts_again_while_it_gets_on(folder: Path) -> None:
    # Fails at steps 0, 1, 2, ... of 6, more often than one restart in a row.
    script = 'n=$(cat attempt 2>/dev/null || echo 0); begin "$n"; ((n < 6)) && exit 1; status finished 9'
    status, _, err = run(folder, script, restarts=1)
    assert status == 0, err
    assert (folder / "attempt").read_text() == "7\n"
    assert err.count("starting again") == 6


def test_it_gives_up_when_it_does_not(folder: Path) -> None:
    status, _, err = run(folder, "begin 5; status failed 5; exit 1", restarts=2)
    assert status == 1
    assert "failure 3 in a row without a further step, given up" in err
    # The first of these got to step 5.
    assert (folder / "attempt").read_text() == "3\n"


def test_an_old_status_is_not_this_attempts(folder: Path) -> None:
    assert run(folder, "begin 0; status finished 9")[0] == 0
    assert run(folder, "exit 7")[0] == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_the_workers_once(folder: Path, number: signal.Signals) -> None:
    # As a launcher, it does not survive a signal itself: only the workers are asked.
    with supervised(folder, f"({WORKER}) & wait") as process:
        process.wait_for_file("status.json")
        process.process.send_signal(number)
        process.process.send_signal(number)
        assert process.end()[0] == 75
    assert (folder / "asked").read_text() == "asked\n"


def test_a_signal_before_there_are_workers(folder: Path) -> None:
    with supervised(folder, "touch ready; exec sleep 60") as process:
        process.wait_for_file("ready")
        process.process.terminate()
        assert process.end()[0] == 75


def test_a_worker_that_does_not_end_is_killed(folder: Path) -> None:
    with supervised(
        folder, "export LOCAL_RANK=0; exec bash -c 'trap : TERM; touch ready; while :; do sleep 0.1; done'", grace=0.3
    ) as process:
        process.wait_for_file("ready")
        process.process.terminate()
        status, _, err = process.end()
    assert status == 75
    assert "not ended in time: killed" in err


def test_no_restart_after_a_signal_that_came_while_waiting(folder: Path) -> None:
    with supervised(folder, f"({WORKER}) & wait", restarts=3) as process:
        process.wait_for_file("status.json")
        process.process.terminate()
        assert process.end()[0] == 75
    assert (folder / "attempt").read_text() == "1\n"


def test_orphans_do_not_stay(folder: Path) -> None:
    status, _, err = run(folder, "setsid bash -c 'sleep 60 & sleep 60' & begin 0; status finished 9")
    assert status == 0
    assert "had outlived the launcher" in err


def test_a_second_launch_of_the_run_is_refused(folder: Path) -> None:
    with supervised(folder, f"({WORKER}) & wait") as process:
        process.wait_for_file("status.json")
        status, _, err = run(folder, "exit 0")
        assert status != 0
        assert f"process {process.process.pid} on this machine is running it already" in err
        process.process.terminate()
        process.end()


def test_what_a_killed_launch_left_is_killed(folder: Path) -> None:
    with supervised(folder, f"setsid bash -c {quoted(WORKER)} & wait") as process:
        process.wait_for_file("status.json")
        process.process.kill()
        process.process.wait()
    status, _, err = run(folder, "begin 0; status finished 9")
    assert status == 0
    assert "process(es) of an earlier launch that had died" in err


def test_one_machine_fails_and_the_others_are_ended(folder: Path) -> None:
    waits = "cat > /dev/null; exit 1"  # Until its standard input ends, as `launch --stop-with-stdin` does over ssh.
    with supervised(folder, waits, "begin 0; status failed 2; exit 9", stop_by="STDIN") as process:
        assert process.process.wait(TIMEOUT) == 9


def test_a_lost_connection_stops_it(folder: Path) -> None:
    with supervised(folder, "begin 0; touch ready; cat > /dev/null; status requeue 4", stop_by="STDIN") as process:
        process.wait_for_file("ready")
        assert process.process.stdin is not None
        process.process.stdin.close()
        process.process.stdin = None
        assert process.end()[0] == 75


def test_a_request_in_the_run_folder(folder: Path) -> None:
    (folder / "flags").mkdir()
    script = "begin 3; touch ready; until ls flags | grep -q 1-stop-; do sleep 0.02; done; status requeue 4; exit 1"
    with supervised(folder, script, stop_by="RUN_FOLDER") as process:
        process.wait_for_file("ready")
        process.process.terminate()
        assert process.end()[0] == 75


def test_mpirun_is_asked_by_a_signal_that_it_passes_on(folder: Path) -> None:
    script = "trap 'status requeue 4; exit 1' USR1; begin 3; touch ready; while :; do sleep 0.02; done"
    with supervised(folder, script, stop_by="LAUNCHER") as process:
        process.wait_for_file("ready")
        process.process.terminate()
        assert process.end()[0] == 75


def test_ranks_on_other_machines_are_told_of_a_killed_one(folder: Path) -> None:
    (folder / "flags").mkdir()
    assert run(folder, "begin 3; kill -9 $$")[0] == 137
    (flag,) = (folder / "flags").iterdir()
    assert flag.name.startswith("1-failed-")
