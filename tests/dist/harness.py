"""Run a function in several processes that a launcher could have started: gloo ranks on this machine.

    run_ranks(check_something, world_size=2, args=(str(tmp_path),), folder=tmp_path)

The function lives at the top level of its file and is called as `function(*args)` with the launcher's variables in the
environment. Its results come back in rank order. If a rank fails, the others are ended and its traceback is raised.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib.util
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.05
FIRST_PORT, PORTS = 12000, 8000


class RankFailed(AssertionError):
    """A rank raised, died or ran out of time."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    folder: Path,
    args: Sequence[Any] = (),
    timeout: float = 600,
) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks. `folder`: an empty one for arguments, results and output."""
    (folder / "args.pickle").write_bytes(pickle.dumps(tuple(args)))
    port = free_port()
    ranks = [start_rank(function, rank, world_size, port, folder, timeout) for rank in range(world_size)]
    try:
        wait_for(ranks, folder, timeout)
    finally:
        for process in ranks:
            end(process)
    return [pickle.loads(result_path(folder, rank).read_bytes())[1] for rank in range(world_size)]


def start_rank(
    function: Callable[..., Any], rank: int, world_size: int, port: int, folder: Path, timeout: float
) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }
    source = Path(function.__code__.co_filename).resolve()
    # Shortly before it is ended for taking too long, a rank says where it stands.
    stack_after = str(0.95 * timeout)
    command = [sys.executable, __file__, str(source), function.__qualname__, str(folder), str(rank), stack_after]
    with (folder / f"rank-{rank}.log").open("wb") as log:
        # A session of its own: ending it ends what the rank has started, too.
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for(ranks: Sequence[subprocess.Popen[bytes]], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in ranks):
        if time.monotonic() > deadline:
            raise RankFailed(f"still running after {timeout} s\n{outputs(folder, len(ranks))}")
        if any(process.poll() for process in ranks):
            break
        time.sleep(POLL_SECONDS)
    for rank, process in enumerate(ranks):
        if process.poll():
            path = result_path(folder, rank)
            reason = pickle.loads(path.read_bytes())[0] if path.exists() else f"died with status {process.returncode}"
            raise RankFailed(f"rank {rank}: {reason}\n{outputs(folder, len(ranks))}")


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outputs(folder: Path, count: int) -> str:
    logs = [(folder / f"rank-{rank}.log").read_text(errors="replace")[-4000:] for rank in range(count)]
    return "\n".join(f"--- output of rank {rank}\n{log}" for rank, log in enumerate(logs))


def result_path(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.pickle"


def free_port() -> int:
    """A port that nothing listens on, below those that the kernel gives to outgoing connections: one of these, gloo's
    for instance, could take it before the ranks do. Test processes begin their search at different places."""
    start = os.getpid() * 101
    for number in range(PORTS):
        port = FIRST_PORT + (start + number) % PORTS
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RankFailed(f"no free port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1}")


def main(source: str, name: str, folder: str, rank: str, stack_after: str) -> int:
    faulthandler.dump_traceback_later(float(stack_after))
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    error, value = "", None
    try:
        spec.loader.exec_module(module)
        value = getattr(module, name)(*pickle.loads((Path(folder) / "args.pickle").read_bytes()))
    except BaseException:  # reported to the parent, whatever it is
        error = traceback.format_exc()
    result_path(Path(folder), int(rank)).write_bytes(pickle.dumps((error, value)))
    return 1 if error else 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    # What Python would call at its end, and not the destructors of C++ after it: one of torch's aborts now and then
    # ("terminate called without an active exception"), when the results are there already.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
