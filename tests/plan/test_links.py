"""Where groups lie, what crosses between nodes, and how long collectives take."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel.ledger import AXES_OF, named_ranks
from rae_scale.parallel.mesh import Mesh
from rae_scale.plan.hardware import DEFAULT_RATES, Rates, find_cluster
from rae_scale.plan.links import Span, all_to_all_seconds, collective_seconds, crossing, link_name, span_of

PERFECT = Rates(link=1.0, network=1.0, base=0.0, short_base=0.0, hop=0.0, short_hop=0.0)


@pytest.mark.parametrize("sizes", [(2, 4, 2, 2), (4, 1, 2, 2), (1, 8, 1, 4), (8, 4, 1, 1)])
def test_ranks_of_groups(sizes: tuple[int, int, int, int]) -> None:
    """As the ledger, and so the mesh, has them."""
    parallel = ParallelConfig(dp_replicate=sizes[0], dp_shard=sizes[1], sp=sizes[2], tp=sizes[3])
    mesh = Mesh(torch.device("cpu"), *sizes)
    for ranks, name in named_ranks(mesh).items():
        span = span_of(name, parallel, 8)
        assert (span.ranks, span.local) == (len(ranks), sum(rank < 8 for rank in ranks)), name
    assert {span_of(name, parallel, 8).ranks for name in AXES_OF} >= {parallel.world_size}


@pytest.mark.parametrize(("ranks", "local"), [(8, 8), (8, 4), (16, 8), (4, 1)])
def test_bytes_that_cross(ranks: int, local: int) -> None:
    """Counted message by message: a ring of consecutive ranks, and every pair of an all-to-all."""
    span, payload = Span(ranks, local), 5040
    node = [rank // local for rank in range(ranks)]
    ring = sum((ranks - 1) / ranks * payload for rank in range(ranks) if node[rank] != node[(rank + 1) % ranks])
    pairs = sum(payload / ranks for a, b in product(range(ranks), repeat=2) if node[a] != node[b])
    assert crossing("all_gather", payload, span) == pytest.approx(ring / ranks)
    assert crossing("all_reduce", payload, span) == pytest.approx(2 * ring / ranks)
    assert crossing("all_to_all", payload, span) == pytest.approx(pairs / ranks)


def test_time_of_large_collectives() -> None:
    """Bound by the link, by one adapter, by the adapters of a node together, or by the link again."""
    cluster, payload = find_cluster("h100-80g", 64), 8e9

    def seconds(kind: str, ranks: int, local: int) -> float:
        return collective_seconds(kind, payload, 1, Span(ranks, local), cluster, PERFECT)  # type: ignore[arg-type]

    assert seconds("all_gather", 8, 8) == pytest.approx(7 / 8 * 8e9 / 450e9)
    assert seconds("all_gather", 8, 1) == pytest.approx(7 / 8 * 8e9 / 50e9, rel=1e-2)
    assert seconds("reduce_scatter", 64, 8) == pytest.approx(63 / 64 * 8e9 / 400e9, rel=1e-2)
    assert seconds("all_reduce", 64, 8) == pytest.approx(2 * seconds("reduce_scatter", 64, 8), rel=1e-2)
    slow_inside = replace(cluster, gpu=replace(cluster.gpu, link=100e9))
    bound = collective_seconds("all_gather", payload, 1, Span(64, 8), slow_inside, PERFECT)
    assert bound == pytest.approx(63 / 64 * 8e9 / 100e9, rel=1e-2)
    # An all-to-all over two nodes of 4: half of it leaves through each rank's own adapter.
    assert all_to_all_seconds(payload, Span(8, 4), cluster, PERFECT) == pytest.approx(8e9 / 2 / 50e9, rel=1e-2)
    assert seconds("all_gather", 1, 1) == 0.0


def test_short_messages_take_what_their_hops_take() -> None:
    """NCCL's own latencies: a start of 6.6 us and, there and back, 7 hops of 0.6 us each; through the network 2.7."""
    cluster, rates = find_cluster("h100-80g", 64), DEFAULT_RATES
    assert collective_seconds("all_reduce", 8, 1, Span(8, 8), cluster, rates) == pytest.approx(
        6.6e-6 + 14 * 0.6e-6, rel=1e-3
    )
    assert collective_seconds("all_gather", 16, 1, Span(16, 8), cluster, rates) == pytest.approx(
        6.6e-6 + 14 * 0.6e-6 + 2.7e-6, rel=1e-3
    )
    one = collective_seconds("all_gather", 1 << 30, 1, Span(8, 8), cluster, rates)
    many = collective_seconds("all_gather", 1 << 30, 1000, Span(8, 8), cluster, rates)
    assert many > one + 999 * rates.short_base
    # Over many nodes a sum goes by trees: its latency grows with the logarithm of their number.
    large = [
        collective_seconds("all_reduce", 1 << 20, 1, Span(8 * nodes, 8), find_cluster("h100-80g", 8 * nodes), rates)
        for nodes in (16, 256)
    ]
    assert large[1] < 2 * large[0]


def test_links_have_names() -> None:
    assert link_name(Span(8, 8), find_cluster("h100-80g", 64)) == "NVLink"
    assert link_name(Span(4, 4), find_cluster("h100-pcie", 4)) == "PCIe"
    assert link_name(Span(16, 8), find_cluster("a100-80g", 64)) == "ib-hdr-200, 8 of 16 ranks to a node"
