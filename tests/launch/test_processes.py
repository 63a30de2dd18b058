"""Finding, asking and killing what a launch has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rae_scale.launch.processes import MARK, descendants, kill_all, mark, read_process, send, stale, workers

TIMEOUT = 20


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid: int) -> bool:
    process = read_process(pid)
    return process is None or process.zombie


def test_a_name_with_brackets_is_read(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as sleeper:
        wait_until(lambda: (Path("/proc") / str(sleeper.pid) / "comm").read_text().startswith("a)"))
        process = read_process(sleeper.pid)
        assert process is not None
        assert process.parent == os.getpid()
        sleeper.kill()
        wait_until(lambda: gone(sleeper.pid))


def test_descendants_in_sessions_of_their_own() -> None:
    script = "setsid sleep 60 & setsid sleep 60 & wait"
    with subprocess.Popen(["bash", "-c", script], start_new_session=True) as shell:
        wait_until(lambda: len(descendants(shell.pid)) == 2)
        children = descendants(shell.pid)
        shell_itself = read_process(shell.pid)
        assert shell_itself is not None
        assert kill_all(lambda: [each for each in (*children, shell_itself) if not gone(each.pid)]) == 3


def test_workers_are_those_with_a_local_rank_and_not_their_children() -> None:
    script = "(export LOCAL_RANK=0; exec bash -c 'sleep 60 & wait') & (LOCAL_RANK=1 exec sleep 60) & sleep 60 & wait"
    with subprocess.Popen(["bash", "-c", script]) as shell:
        wait_until(lambda: len(descendants(shell.pid)) == 4)
        wait_until(lambda: len(workers(shell.pid)) == 2)
        below = descendants(shell.pid)
        assert {each.parent for each in workers(shell.pid)} == {shell.pid}
        for each in below:
            send(each, signal.SIGKILL)


def test_a_number_that_was_given_to_another_process_is_left_alone() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        process = read_process(sleeper.pid)
        assert process is not None
        send(type(process)(process.pid, process.parent, process.started - 1), signal.SIGKILL)
        assert sleeper.poll() is None
        send(process, signal.SIGKILL)
        assert sleeper.wait(TIMEOUT) == -signal.SIGKILL


LAUNCH = """
import os, subprocess, sys
from pathlib import Path
from rae_scale.launch.processes import MARK, mark
child = subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: mark(Path(sys.argv[1]))}, start_new_session=True)
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_orphans_of_a_killed_launch_are_found(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    for folder in (ours, other):
        folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(ours)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as launch:
        assert launch.stdout is not None
        child = int(launch.stdout.readline())
        wait_until(lambda: stale(ours) == ([], [launch.pid]))
        launch.kill()
        launch.wait()
        orphans, alive = stale(ours)
        assert ([each.pid for each in orphans], alive) == ([child], [])
        assert stale(other) == ([], [])
        kill_all(lambda: stale(ours)[0])
        assert gone(child)


def test_a_process_without_a_mark_is_nobodys(tmp_path: Path) -> None:
    assert MARK not in os.environ
    assert stale(tmp_path) == ([], [])
    assert mark(tmp_path).endswith(str(tmp_path))
