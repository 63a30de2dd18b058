"""Files in /dev/shm that killed processes leave: DeepSpeed's buffers, NCCL's, torch's tensors, semaphores.

A file is removed only if it provably is of dead processes of this launch: they were seen to have it mapped, or its name
says so, and no living process has it mapped now.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from rae_scale.launch.processes import PROC, Process, all_processes

SHM = Path("/dev/shm")
# deepspeed/ops/csrc/cpu/comm/shm.cpp: user, MASTER_ADDR, MASTER_PORT, rank.
DEEPSPEED = re.compile(r"deepspeed_allreduce_buffer_(?P<uid>\d+)_.*_(?P<port>\d+)_\d+")
# torch/csrc/.../allocator: the process that made it.
TORCH = re.compile(r"torch_(?P<pid>\d+)_.*")


class SharedMemory:
    """What one attempt's processes have in /dev/shm. port: MASTER_PORT, which was this run's alone."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._pids: set[int] = set()
        self._files: set[tuple[str, int]] = set()

    def observe(self, processes: Iterable[Process]) -> None:
        """Note what they have mapped. Called now and then while they live."""
        for process in processes:
            self._pids.add(process.pid)
            self._files |= mapped(process.pid)

    def remove_left(self) -> list[str]:
        """After all of them have ended; returns the names of removed files."""
        in_use = {inode for process in all_processes() for _, inode in mapped(process.pid)}
        removed = []
        for path in sorted(SHM.iterdir()):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            ours = (path.name, status.st_ino) in self._files or self._names_us(path.name)
            if ours and status.st_uid == os.getuid() and status.st_ino not in in_use:
                path.unlink(missing_ok=True)
                removed.append(path.name)
        return removed

    def _names_us(self, name: str) -> bool:
        if buffer := DEEPSPEED.fullmatch(name):
            return int(buffer["uid"]) == os.getuid() and int(buffer["port"]) == self.port
        tensor = TORCH.fullmatch(name)
        return tensor is not None and int(tensor["pid"]) in self._pids


def mapped(pid: int) -> set[tuple[str, int]]:
    """Name and inode of what the process has mapped from /dev/shm."""
    try:
        lines = (PROC / str(pid) / "maps").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    found = set()
    for line in lines:
        # address perms offset device inode path
        if f" {SHM}/" in line and not line.endswith("(deleted)"):
            inode, path = line.split(maxsplit=5)[4:]
            found.add((path.removeprefix(f"{SHM}/"), int(inode)))
    return found
