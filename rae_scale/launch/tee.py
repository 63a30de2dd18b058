"""What a command prints goes to the terminal as before, and into a log."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import IO

CHUNK_BYTES = 65536


class Log:
    """Appended to by several streams, whole chunks at a time. A log that cannot be written does not stop the run."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()
        self._full = False

    def write(self, chunk: bytes) -> None:
        with self._lock:
            try:
                self._file.write(chunk)
                self._full = False
            except OSError as error:
                if not self._full:
                    message = f"rae-scale: {self.path}: {error.strerror}; output goes to the terminal only\n"
                    write_all(2, message.encode())
                self._full = True

    def close(self) -> None:
        self._file.close()


class Tee(threading.Thread):
    """Copies `source` to the file descriptor `terminal` and to `log` until it ends.

    prefix: put before each line, where streams of several machines meet. When nobody reads the terminal any more the
    log goes on, and `hung_up` is set.
    """

    def __init__(self, source: IO[bytes], terminal: int, log: Log, prefix: bytes = b"") -> None:
        super().__init__(daemon=True)
        self.hung_up = threading.Event()
        self._source, self._terminal, self._log, self._prefix = source, terminal, log, prefix
        self.start()

    def run(self) -> None:
        begins = True
        with self._source:
            while chunk := os.read(self._source.fileno(), CHUNK_BYTES):
                if self._prefix:
                    lines = chunk.replace(b"\n", b"\n" + self._prefix)
                    ends = chunk.endswith(b"\n")
                    marked = lines.removesuffix(self._prefix) if ends else lines
                    chunk, begins = (self._prefix + marked if begins else marked), ends
                self._log.write(chunk)
                if not self.hung_up.is_set():
                    try:
                        write_all(self._terminal, chunk)
                    except OSError:
                        self.hung_up.set()


def write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
