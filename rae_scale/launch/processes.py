"""Linux processes that belong to a launch: found, asked to stop, and killed when they outlive it.

Launchers put workers into sessions of their own, so a process group does not hold them together. Being their reaper
does: whatever loses its parent becomes a child of this process and stays among its descendants.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PROC = Path("/proc")
# In the environment of everything that a launch starts: who started it, and for which folder.
MARK = "RAE_LAUNCH"
KILL_SECONDS = 10.0
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Process:
    """started: clock ticks since boot, which tell it from a later process with the same number."""

    pid: int
    parent: int
    started: int
    zombie: bool = False


def read_process(pid: int) -> Process | None:
    """None if there is none."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in brackets, which may hold spaces and brackets.
    state, parent, *rest = text.rpartition(")")[2].split()
    return Process(pid, int(parent), int(rest[17]), state in "ZX")


def all_processes() -> list[Process]:
    found = (read_process(int(entry.name)) for entry in PROC.iterdir() if entry.name.isdigit())
    return [process for process in found if process is not None]


def descendants(root: int) -> list[Process]:
    """Of process `root`, without itself and without zombies; parents before their children."""
    children: dict[int, list[Process]] = {}
    for process in all_processes():
        children.setdefault(process.parent, []).append(process)
    found, parents = [], [root]
    while parents:
        for process in children.get(parents.pop(0), []):
            found.append(process)
            parents.append(process.pid)
    return [process for process in found if not process.zombie]


def environment(pid: int) -> dict[str, str]:
    """What the process was started with; empty if it is gone, or another user's."""
    try:
        content = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition(b"=") for entry in content.split(b"\0") if entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def workers(root: int) -> list[Process]:
    """The training processes below `root`: told a LOCAL_RANK, which their own children inherit."""
    below = descendants(root)
    ranked = {process.pid for process in below if "LOCAL_RANK" in environment(process.pid)}
    return [process for process in below if process.pid in ranked and process.parent not in ranked]


def send(process: Process, number: signal.Signals) -> None:
    """Unless it has ended. Its number may have gone to another process since it was found."""
    now = read_process(process.pid)
    if now is not None and now.started == process.started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def kill_all(find: Callable[[], Iterable[Process]]) -> int:
    """Kill what `find` finds until it finds nothing, for a killed one may have started another. Returns how many.

    Raises:
        ValueError: some cannot be killed: they hang in the kernel (a file system or a driver that does not answer).
    """
    killed: set[tuple[int, int]] = set()
    deadline = time.monotonic() + KILL_SECONDS
    while left := list(find()):
        for process in left:
            send(process, signal.SIGKILL)
            killed.add((process.pid, process.started))
        reap()
        if time.monotonic() > deadline:
            numbers = ", ".join(str(process.pid) for process in left)
            raise ValueError(
                f"processes {numbers} of the last attempt do not end when killed: they wait in the kernel for a driver "
                "or a file system; this machine needs a look (dmesg) and most likely a restart"
            )
        time.sleep(POLL_SECONDS)
    return len(killed)


def reap() -> None:
    """Take note of children that have ended, so that they leave the process table. Not while a Popen is waited for."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def become_reaper() -> None:
    """Descendants without a parent become children of this process."""
    if libc().prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def die_with_parent() -> Callable[[], None]:
    """What a child calls between fork and exec to be killed when this thread ends, however it does."""
    prctl = libc().prctl
    return lambda: prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def mark(folder: Path) -> str:
    """This process, as `stale` reads it: number and start within a PID namespace, and the folder of the run."""
    own = read_process(os.getpid())
    assert own is not None
    return f"{os.readlink('/proc/self/ns/pid')} {own.pid} {own.started} {folder.resolve()}"


def stale(folder: Path) -> tuple[list[Process], list[int]]:
    """Processes of earlier launches for `folder` whose launch is dead, and the numbers of launches that are alive."""
    orphans, alive = [], set()
    for process in all_processes():
        namespace, _, rest = environment(process.pid).get(MARK, "").partition(" ")
        pid, _, rest = rest.partition(" ")
        started, _, of_folder = rest.partition(" ")
        if namespace != os.readlink("/proc/self/ns/pid") or of_folder != str(folder.resolve()):
            continue
        launch = read_process(int(pid))
        if launch is not None and launch.started == int(started) and not launch.zombie:
            alive.add(launch.pid)
        elif not process.zombie:
            orphans.append(process)
    return orphans, sorted(alive - {os.getpid()})
