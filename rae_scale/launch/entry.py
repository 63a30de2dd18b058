"""What batch systems and containers execute on every machine: `rae-scale launch` again, for its processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """node_rank and master_addr: as the batch system's own shell or kubelet completes them."""

    command: tuple[str, ...]
    nodes: str
    processes: int
    node_rank: str
    master_addr: str
    master_port: str
    restarts: int = 0
    fit: bool = False
    preflight: bool = False

    def words(self) -> list[str]:
        """Behind `rae-scale`."""
        return [
            *("launch", "--with", "torchrun", "--nodes", self.nodes, "--node-rank", self.node_rank),
            *("--processes", str(self.processes), "--master-addr", self.master_addr),
            *("--master-port", self.master_port),
            *(("--restarts", str(self.restarts)) if self.restarts else ()),
            *(("--fit",) if self.fit else ()),
            *(("--preflight",) if self.preflight else ()),
            *("--", *self.command),
        ]
