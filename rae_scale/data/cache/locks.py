"""Locks between the processes of a machine, that the kernel takes back when the holder dies."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.02


class LockBusy(Exception):
    """Another process, or another thread, still holds it."""


@contextmanager
def lock(path: Path, number: int, timeout_s: float) -> Iterator[None]:
    """Hold lock `number` of the lock file `path`. Raises LockBusy when it is not free within `timeout_s`.

    It is one byte of the file, of an open file description of its own: so a folder of 91,000 shards needs one file,
    and threads exclude each other like processes.
    """
    deadline = time.monotonic() + timeout_s
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not try_lock(descriptor, number):
            if time.monotonic() >= deadline:
                raise LockBusy(f"lock {number} of {path}")
            time.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, number: int) -> bool:
    # struct flock: type, whence, start, length, pid (0 for this kind of lock).
    request = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
    except BlockingIOError:
        return False
    except PermissionError:  # EACCES: the other answer that POSIX allows
        return False
    return True
