"""What processes leave behind when they are killed: their children, their ports, temporary files, shared memory."""

from __future__ import annotations

import ctypes
import multiprocessing.util
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWNS = 0x20000
# Python's own helpers of this process, and the folder of their socket. They end with it.
HELPERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
HELPERS_FOLDER = "pymp-"


class Leftovers:
    """Looks for what was not there before. Processes that lose their parent become this one's children."""

    def __init__(self, folder: Path) -> None:
        """folder: will hold the temporary files of this process and of those that it starts."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        if os.geteuid() == 0 and libc.unshare(CLONE_NEWNS) == 0:
            # Shared memory of our own: what others leave in the machine's is not ours.
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", SHARED_MEMORY], check=True)
        # Python removes the folder of its helpers at its own end, when `folder` may be gone.
        multiprocessing.util.get_temp_dir()
        folder.mkdir()
        self.temporary = folder
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        self.expected: set[Path] = set()
        self.expect_what_is_there()

    def expect_what_is_there(self) -> None:
        """Report none of the files that are there now: caches, say, that an undisturbed run leaves, too."""
        self.expected = self.files()

    def files(self) -> set[Path]:
        temporary = {path for path in self.temporary.iterdir() if not path.name.startswith(HELPERS_FOLDER)}
        return temporary | set(SHARED_MEMORY.iterdir())

    def found(self, run_dir: Path, ports: Iterable[int]) -> list[str]:
        """In words. run_dir: has no unfinished files. ports: nothing listens on them."""
        files = sorted(self.files() - self.expected)
        files += [path for path in run_dir.rglob("*") if path.name.endswith((".tmp", ".old"))]
        return [f"process {line}" for line in descendants()] + [
            *(f"file {path}" for path in files),
            *(f"port {port}" for port in ports if not can_be_bound(port)),
        ]


def descendants() -> list[str]:
    """Command lines of this process's children and theirs, but for Python's helpers."""
    found, waiting = [], [os.getpid()]
    while waiting:
        pid = waiting.pop()
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            waiting += map(int, children.read_text().split())
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        # A zombie has no command line. It is gone as soon as this process asks for it.
        if pid != os.getpid() and line and not any(helper in line for helper in HELPERS):
            found.append(f"{pid}: {line}")
    return found


def can_be_bound(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
