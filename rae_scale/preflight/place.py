"""Who is where: a rank's place as it registers it, and all of them together."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rae_scale.parallel.ranks import Ranks
from rae_scale.train.shared_build import machine

MOST_NAMED = 4
NETWORK_NAMESPACE = "/proc/self/ns/net"


@dataclass(frozen=True)
class Place:
    """A process, as it introduces itself.

    local_world_size: ranks of its machine; None where the launcher does not say.
    machine: equal for processes of one machine, and of one container or network namespace on it.
    address: from which it reaches rank 0. source: the launcher that it believes.
    """

    rank: int
    local_rank: int
    local_world_size: int | None
    world_size: int
    host: str
    machine: str
    address: str
    pid: int
    source: str

    def __str__(self) -> str:
        return f"{self.host} (pid {self.pid}, {self.address})"


def own_place(ranks: Ranks) -> Place:
    return Place(
        rank=ranks.rank,
        local_rank=ranks.local_rank,
        local_world_size=ranks.local_world_size,
        world_size=ranks.world_size,
        host=socket.gethostname(),
        machine=" ".join((*machine(), network_namespace())),
        address=own_address(ranks.master_addr, ranks.master_port),
        pid=os.getpid(),
        source=ranks.source,
    )


def network_namespace() -> str:
    try:
        return os.readlink(NETWORK_NAMESPACE)
    except OSError:
        return ""


def own_address(host: str, port: int) -> str:
    """Of the interface that leads to `host`; nothing is sent. "unknown" where no way leads there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "unknown"


class Roster:
    """The places of all ranks that came. Of two with one rank the first counts."""

    def __init__(self, places: Iterable[Place]) -> None:
        self.places: dict[int, Place] = {}
        for place in places:
            self.places.setdefault(place.rank, place)

    @property
    def machines(self) -> list[list[int]]:
        """The ranks of each machine, in the order of their first ones."""
        found: dict[str, list[int]] = {}
        for rank in sorted(self.places):
            found.setdefault(self.places[rank].machine, []).append(rank)
        return list(found.values())

    @property
    def leaders(self) -> list[int]:
        """The first rank of each machine."""
        return [ranks[0] for ranks in self.machines]

    def host(self, rank: int) -> str:
        """The name of the rank's machine, with its address where two machines have one name."""
        place = self.places[rank]
        others = {each.machine for each in self.places.values() if each.host == place.host}
        return place.host if len(others) == 1 else f"{place.host} ({place.address})"

    def who(self, ranks: Sequence[int]) -> str:
        """Machines and ranks, in words: "node2 (ranks 8-15)"."""
        if not ranks or (len(self.places) > 1 and set(ranks) == self.places.keys()):
            return "all"
        by_host: dict[str, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(self.host(rank) if rank in self.places else "not here", []).append(rank)
        texts = [f"{host} ({numbers(found)})" for host, found in by_host.items()]
        more = f" and {len(texts) - MOST_NAMED} more machines" if len(texts) > MOST_NAMED else ""
        return ", ".join(texts[:MOST_NAMED]) + more


def numbers(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0-3, 7"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
