"""What each process of a launched run does before anything else."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from pathlib import Path

PR_SET_PDEATHSIG = 1


def settle(local_rank: int) -> None:
    """Do not outlive the launcher, and compile kernels into a folder of its own.

    A launcher that is killed would leave its processes behind, with the GPUs' memory and the run's folder. Killing them
    loses nothing that a checkpoint has: those appear whole.

    Triton's cache is meant for one process; on a network file system several trip over each other's renames. The folder
    is the same in the next attempt, so that nothing is compiled twice: TRITON_CACHE_DIR (default ~/.triton/cache), then
    host and local rank.
    """
    die_with_launcher()
    own = f"{socket.gethostname()}-{local_rank}"
    base = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    if base.name != own:
        os.environ["TRITON_CACHE_DIR"] = str(base / own)


def die_with_launcher() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
