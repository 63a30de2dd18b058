"""Who listens on a port of this machine, and whether one of another machine answers."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

PROC = Path("/proc")
LISTENING = "0A"
COMMAND_LENGTH = 80


def listener(port: int) -> str:
    """The process that holds `port`, in words. The kernel shows its number only to its user and to root."""
    inodes = listening_inodes(port)
    for entry in PROC.iterdir():
        if entry.name.isdigit() and inodes.intersection(open_files(entry)):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            return f"pid {entry.name} ({command[:COMMAND_LENGTH]})"
    return "a process of another user or container"


def open_files(process: Path) -> set[str]:
    """What the files of `process` (/proc/PID) are; of another user's process nothing."""
    found: set[str] = set()
    try:
        for link in (process / "fd").iterdir():
            # One that was closed meanwhile, as that of this listing, hides no other.
            with contextlib.suppress(FileNotFoundError):
                found.add(os.readlink(link))
    except OSError:
        pass
    return found


def listening_inodes(port: int) -> set[str]:
    """As the links in /proc/PID/fd show them."""
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == LISTENING and int(fields[1].rsplit(":", 1)[1], 16) == port:
                found.add(f"socket:[{fields[9]}]")
    return found


def addresses(host: str) -> list[str]:
    """
    Raises:
        OSError: it has no address.
    """
    return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})


def connection_problem(host: str, port: int, seconds: float) -> str:
    """Why nobody answers at `host`:`port`, in words; empty if somebody does."""
    try:
        found = addresses(host)
    except OSError as error:
        return f"the name {host!r} has no address here ({error.strerror or error})"
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return ""
    except ConnectionRefusedError:
        return f"{host} ({', '.join(found)}) is up, but nothing listens on port {port}"
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return f"{host} ({', '.join(found)}), port {port}: {reason}; the machine is down, or a firewall is between"
