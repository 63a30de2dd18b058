"""Collectives over the groups of a mesh: time, bandwidth, and how long a step's traffic would take by them.

Bandwidths are those of NVIDIA's nccl-tests (its PERFORMANCE.md): the algorithm bandwidth is payload over time, the bus
bandwidth is what a rank sends over time, (n-1)/n of the payload or twice that for an all-reduce. Payloads are counted
as in `parallel.ledger`: the whole tensor on one rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from rae_scale.bench.chart import lines
from rae_scale.bench.collectives import COLLECTIVES, Collective, groups_of, ledger_name, time_collective
from rae_scale.bench.harness import Benchmark, Case, Measured, Overrides, check_relevant, run_benchmark
from rae_scale.bench.record import Measure, Record, Row, config_sections, facts_of, short
from rae_scale.bench.results import table
from rae_scale.bench.session import Session
from rae_scale.bench.setup import StepSetup
from rae_scale.bench.step import SECTIONS, step_of
from rae_scale.config import Config
from rae_scale.parallel import Mesh
from rae_scale.parallel.ledger import Ledger, sent

COLUMNS = {
    "collective": "{collective}",
    "group": "{group}",
    "ranks": "{ranks}",
    "payload bytes": "{payload:,}",
    "ms": "{time_ms:.3f}",
    "10 - 90 %": "{time_low_ms:.3f} - {time_high_ms:.3f}",
    "algorithm GB/s": "{algorithm_gb_s:.3f}",
    "bus GB/s": "{bus_gb_s:.3f}",
}
TRAFFIC_COLUMNS = {
    "collective": "{collective}",
    "group": "{group}",
    "calls": "{calls:,}",
    "payload bytes": "{payload:,}",
    "ms by these times": "{estimate_ms:.2f}",
}


def bench_comm(
    setup: StepSetup,
    session: Session,
    points: Sequence[Overrides] = ((),),
    *,
    payloads: Sequence[int],
    groups: Sequence[str] = (),
    collectives: Sequence[Collective] = COLLECTIVES,
    traffic: bool = False,
    repeats: int = 20,
    warm_up: int = 5,
    after_row: Callable[[Record], None] = lambda record: None,
) -> Record:
    """A row for each point, group, collective and payload, on the layout of `setup`. Collective.

    groups: by the names of `parallel.ledger.AXES_OF`; none is all that the layout has. traffic: also count what a step
    of `setup` sends, and estimate how long that takes by these times; with one point.

    Raises:
        ValueError: one process, which has nobody to talk to, or no such group.
    """
    if session.world_size == 1:
        raise ValueError(
            "bench comm needs several processes: start them with torchrun, and say in parallel.* how they lie, for "
            "example engine.name=fsdp2 parallel.dp_shard=2"
        )
    if traffic and len(points) > 1:
        raise ValueError("--traffic is of one layout; leave --sweep out")

    def cases_of(point: Overrides) -> list[Case]:
        config = setup.with_overrides(point).config()
        check_relevant("comm", [*setup.overrides, *point], SECTIONS)
        mesh = session.mesh(config.parallel)
        found = groups_of(mesh)
        cases = []
        # dp and shard, say, are the same ranks where nothing is replicated, and are measured once.
        wanted = dict.fromkeys(ledger_name(name, mesh) for name in groups) if groups else found
        for name in wanted:
            for kind in collectives:
                cases += [case_of(config, mesh, name, found[name], kind, payload) for payload in payloads]
        return cases

    def case_of(
        config: Config, mesh: Mesh, name: str, group: dist.ProcessGroup, kind: Collective, payload: int
    ) -> Case:
        own = {"collective": kind, "group": name, "payload": payload}
        settings = {**own, "config": config_sections(config, ["parallel"])}
        facts = facts_of(config, precision="fp32")
        run = functools.partial(measure, kind, payload, group, mesh.device, repeats=repeats, warm_up=warm_up)
        return Case(settings, facts, run, own)

    record = run_benchmark(COMM, points, cases_of, session, after_row=after_row)
    if traffic:
        record.facts["traffic"] = estimate(record.rows, count_traffic(setup.with_overrides(points[0]), session))
    return record


def measure(
    kind: Collective, payload: int, group: dist.ProcessGroup, device: torch.device, *, repeats: int, warm_up: int
) -> Measured:
    found = time_collective(kind, payload, group, device, repeats=repeats, warm_up=warm_up)
    time = Measure.of(found.seconds)
    return Measured(
        {"time": time},
        {
            "ranks": group.size(),
            "payload": found.payload,
            "calls_per_repeat": found.calls,
            "algorithm_gb_s": found.payload / time.median / 1e9,
            "bus_gb_s": sent(kind, found.payload, group.size()) / time.median / 1e9,
        },
    )


def count_traffic(setup: StepSetup, session: Session) -> list[dict[str, Any]]:
    """What one step of `setup` sends, in the steady state: calls and payload bytes by kind and group. Collective."""
    mesh = session.mesh(setup.config().parallel)
    with step_of(setup, "ours", mesh) as step:
        micro_batches = [step.inputs(step.batch, 0)] * step.micro_steps
        for _ in range(2):  # engines learn in their first steps what to gather when
            step.run(micro_batches)
        with Ledger(mesh) as ledger:
            step.run(micro_batches)
        return [
            {"collective": kind, "group": group, "calls": entry.calls, "payload": entry.payload}
            for (kind, group), entry in ledger.entries().items()
        ]


def estimate(rows: Sequence[Row], traffic: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to every kind of `traffic` how long it takes: the median of the smallest payload for every call, and the
    payload at the largest one's algorithm bandwidth. Kinds and groups that were not measured get none."""
    found = []
    for entry in traffic:
        measured = [
            row
            for row in rows
            if row.measures and all(row.varied[name] == entry[name] for name in ("collective", "group"))
        ]
        seconds: dict[str, float] = {}
        if measured:
            by_size = sorted(measured, key=lambda row: row.values["payload"])
            latency, rate = by_size[0].measures["time"].median, 1e9 * by_size[-1].values["algorithm_gb_s"]
            seconds = {"estimate_ms": 1e3 * (entry["calls"] * latency + entry["payload"] / rate)}
        found.append({**entry, **seconds})
    return found


def notes(record: Record) -> list[str]:
    traffic = record.facts.get("traffic")
    if traffic is None:
        return []
    total = sum(entry.get("estimate_ms", 0.0) for entry in traffic)
    return [
        "What one step sends, and how long that takes if every call waits as long as the smallest payload above and "
        "bytes move as fast as in the largest; nothing runs at the same time:\n",
        table(traffic, TRAFFIC_COLUMNS),
        f"together {total:.2f} ms; kinds without a time were not measured",
    ]


def series(row: Row) -> str:
    others = {name: value for name, value in row.varied.items() if name not in ("collective", "group", "payload")}
    more = "".join(f", {short(name)} {value}" for name, value in others.items())
    return f"{row.varied['collective']} {row.varied['group']}{more}"


CHART = lines("payload", "bus_gb_s", series, ("payload bytes", "bus bandwidth, GB/s"), log=True)
COMM = Benchmark("comm", "Collectives", COLUMNS, CHART, notes=notes)
