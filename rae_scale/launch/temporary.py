"""A launch's own folder for temporary files: what killed processes leave there goes with it.

torchrun and multiprocessing clean up after themselves only if they end by themselves.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from rae_scale.launch.processes import read_process
from rae_scale.launch.shared_memory import SharedMemory

# PID namespace, number and start of the launch, MASTER_PORT.
NAME = re.compile(r"rae-launch-(?P<namespace>\d+)-(?P<pid>\d+)-(?P<started>\d+)-(?P<port>\d+)-\w+")


class TemporaryFolder:
    """Given to one attempt's processes as TMPDIR. port: MASTER_PORT, for whoever cleans up after a killed launch."""

    def __init__(self, port: int) -> None:
        own = read_process(os.getpid())
        assert own is not None
        name = f"rae-launch-{namespace()}-{own.pid}-{own.started}-{port}-"
        self.path = Path(tempfile.mkdtemp(prefix=name))

    def variables(self) -> dict[str, str]:
        """Compiled kernels stay where they would be without this, for the next attempt."""
        kernels = str(Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}")
        return {
            "TMPDIR": str(self.path),
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR") or kernels,
        }

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def remove_stale() -> None:
    """What launches of this user that were killed have left, here and in /dev/shm. Their processes must have ended."""
    for path in Path(tempfile.gettempdir()).glob("rae-launch-*"):
        match = NAME.fullmatch(path.name)
        if match is None or match["namespace"] != namespace() or path.lstat().st_uid != os.getuid():
            continue
        launch = read_process(int(match["pid"]))
        if launch is None or launch.zombie or launch.started != int(match["started"]):
            SharedMemory(int(match["port"])).remove_left()
            shutil.rmtree(path, ignore_errors=True)


def namespace() -> str:
    """Of process numbers: in another one they mean other processes."""
    return os.readlink("/proc/self/ns/pid").strip("pid:[]")
