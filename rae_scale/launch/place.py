"""Where the processes of a run are: how many machines, how many on each, and where rank 0 listens."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rae_scale.launch.hosts import Host
from rae_scale.launch.subject import Subject

RESOLVE_SECONDS = 2.0


@dataclass(frozen=True)
class Place:
    """
    hosts: the machines by rank of the node; slots is how many processes each has.
    node_rank: this machine's; None where it is not one of them, or starts the others.
    rendezvous: how torchrun's agents find each other, static or c10d.
    environment: what `--env` names.
    """

    subject: Subject
    hosts: tuple[Host, ...]
    master_addr: str
    master_port: int
    node_rank: int | None = None
    rendezvous: str = "static"
    environment: Mapping[str, str] = field(default_factory=dict)
    hostfile: Path | None = None
    python: str = sys.executable
    gpus: int = 0

    @property
    def nodes(self) -> int:
        return len(self.hosts)

    @property
    def processes(self) -> int:
        """Of the whole run."""
        return sum(self.slots(node) for node in range(self.nodes))

    def slots(self, node: int) -> int:
        slots = self.hosts[node].slots
        assert slots is not None  # Filled in when the place was made.
        return slots

    def title(self, node: int) -> str:
        return f"node {node} of {self.nodes}: {self.hosts[node].name}, {self.slots(node)} process(es)"

    def on(self, node: int) -> Place:
        return replace(self, node_rank=node)


def wait_for_name(name: str, timeout_s: float) -> None:
    """Until `name` has an address: the machine of rank 0 may still be starting, and its name appears with it.

    Raises:
        ValueError: it has none after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.getaddrinfo(name, None)
            return
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"--master-addr {name}: no address for this name after {timeout_s:.0f} s ({error.strerror}); "
                    "give the address of node 0, or a name that every node can look up"
                ) from None
        time.sleep(RESOLVE_SECONDS)
