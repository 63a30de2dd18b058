"""How the ranks of a group lie on the nodes, and how long a collective between them takes.

Assumed is what NCCL does. A ring passes each node boundary once, and there are as many rings side by side as the group
has adapters on a node: so a group with l ranks on each of several nodes moves up to l adapters' worth, but no more than
its links inside a node carry. Short messages go by the protocol with half the bandwidth and short hops (LL), sums over
all ranks also by trees: whatever is fastest. Formulas and latencies are those of NCCL's tuning (src/graph/tuning.cc).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel.ledger import AXES_OF, Kind, sent, sizes_of
from rae_scale.plan.hardware import Cluster, Rates

TREE_BANDWIDTH = 0.92
LL_BANDWIDTH = 0.5


@dataclass(frozen=True)
class Span:
    """A group of `ranks` ranks, `local` of them on each node that it reaches."""

    ranks: int
    local: int

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.local)

    @property
    def crosses(self) -> bool:
        """Whether it needs the network."""
        return self.ranks > self.local


@cache
def span_of(group: str, parallel: ParallelConfig, gpus_per_node: int) -> Span:
    """Of the group of that name with rank 0 in it (`parallel.ledger.AXES_OF`). Ranks are numbered with tp the fastest
    axis, then sp, dp_shard and dp_replicate, and fill node after node."""
    sizes = sizes_of(parallel)
    members, stride = [0], 1
    for axis in reversed(sizes):
        if axis in AXES_OF[group]:
            members = [first + stride * index for index in range(sizes[axis]) for first in members]
        stride *= sizes[axis]
    return Span(len(members), sum(member < gpus_per_node for member in members))


def crossing(kind: Kind, payload: int, span: Span) -> float:
    """Bytes that a rank sends over the network, on average: of a ring one rank of a node's, of an all-to-all what is
    for other nodes."""
    if not span.crosses:
        return 0.0
    if kind == "all_to_all":
        return payload * (span.ranks - span.local) / span.ranks
    return sent(kind, payload, span.ranks) / span.local


def ring_bandwidth(span: Span, cluster: Cluster, rates: Rates) -> float:
    """Bytes/s that each rank of the group passes on."""
    inside = cluster.gpu.link * rates.link
    outside = cluster.network_rate * rates.network * span.local
    if not span.crosses:
        return inside
    return outside if span.local == 1 else min(inside, outside)


def collective_seconds(kind: Kind, payload: float, calls: int, span: Span, cluster: Cluster, rates: Rates) -> float:
    """Of `calls` equal collectives that move `payload` bytes together."""
    if span.ranks == 1 or not calls:
        return 0.0
    each = payload / calls
    if kind == "all_to_all":
        return calls * all_to_all_seconds(each, span, cluster, rates)
    wire = sent(kind, 1, span.ranks) * each
    bandwidth = ring_bandwidth(span, cluster, rates)
    ways = [wire / (bandwidth * LL_BANDWIDTH) + latency(kind, span, cluster, rates, short=True)]
    ways.append(wire / bandwidth + latency(kind, span, cluster, rates, short=False))
    if kind == "all_reduce":
        ways.append(wire / (bandwidth * TREE_BANDWIDTH) + tree_latency(span, cluster, rates))
    return calls * min(ways)


def latency(kind: Kind, span: Span, cluster: Cluster, rates: Rates, *, short: bool) -> float:
    """Of a ring: its start, and a hop for each other rank, some of them between nodes; there and back for a sum."""
    times = 2 if kind == "all_reduce" else 1
    between = span.nodes - 1
    base, hop, network_hop = hops(cluster, rates, short)
    return base + times * ((span.ranks - 1 - between) * hop + between * network_hop)


def tree_latency(span: Span, cluster: Cluster, rates: Rates) -> float:
    """A chain inside each node, a tree over the nodes."""
    base, hop, network_hop = hops(cluster, rates, short=False)
    return base + 2 * ((span.local - 1) * hop + math.ceil(math.log2(span.nodes)) * network_hop)


def hops(cluster: Cluster, rates: Rates, short: bool) -> tuple[float, float, float]:
    """(start, hop inside a node, hop between nodes), seconds."""
    if short:
        return rates.short_base, rates.short_hop, cluster.network.short_hop
    return rates.base, rates.hop, cluster.network.hop


def all_to_all_seconds(payload: float, span: Span, cluster: Cluster, rates: Rates) -> float:
    """Every rank sends each other its part at once: over its own adapter to other nodes, over its link to the rest."""
    part = payload / span.ranks
    inside = part * (span.local - 1) / (cluster.gpu.link * rates.link)
    if not span.crosses:
        return rates.base + rates.hop + inside
    outside = part * (span.ranks - span.local) / (cluster.network_rate * rates.network)
    return rates.base + cluster.network.hop + max(inside, outside)


def link_name(span: Span, cluster: Cluster) -> str:
    """What the ranks of a group talk over, in words."""
    if span.crosses:
        return f"{cluster.network.name}, {span.local} of {span.ranks} ranks to a node"
    return "NVLink" if cluster.gpu.has_nvlink else "PCIe"
