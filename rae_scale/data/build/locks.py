"""Locks between builders, on one machine or on several that share a file system.

`flock` on small files beside the data: the system releases it when a process dies, so there is no stale lock. NFS and
GPFS have it, Lustre when mounted with `flock`.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.05


class Held(Exception):
    """Another process holds the lock."""


@contextmanager
def lock(path: Path, *, shared: bool = False, patience_s: float = 0.0) -> Iterator[None]:
    """Hold the lock on `path`, a file that is made when missing and stays.

    Raises Held when another process still holds it after `patience_s`; ValueError on a file system without locks.
    """
    # Open for writing: where flock is emulated (NFS), an exclusive lock needs that.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        acquire(descriptor, path, shared, time.monotonic() + patience_s)
        yield
    finally:
        os.close(descriptor)


def acquire(descriptor: int, path: Path, shared: bool, until: float) -> None:
    mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    while True:
        try:
            fcntl.flock(descriptor, mode)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise Held(str(path)) from None
            time.sleep(POLL_S)
        except OSError as error:
            raise ValueError(
                f"{path}: its file system has no file locks ({error.strerror}), without which two builds could write "
                "one folder; build on another one, or mount it with them (Lustre: -o flock)"
            ) from None
