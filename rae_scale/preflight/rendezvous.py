"""Ranks find each other, or it is said who is missing, too many, or of another opinion.

Rank 0 holds a store at MASTER_ADDR:MASTER_PORT, as it will in training; torchrun's agent holds it for its ranks. Each
rank registers there before any process group is made, rank 0 judges the list, and all hear the same verdict.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from rae_scale.parallel.ranks import Ranks, is_loopback
from rae_scale.preflight.board import Board, first_line
from rae_scale.preflight.bounded import Stuck, within
from rae_scale.preflight.finding import Finding, failed
from rae_scale.preflight.place import Place, Roster, numbers
from rae_scale.preflight.ports import connection_problem, listener

ATTENDANCE, VERDICT, HEARD = "attendance", "verdict", "heard"
GRACE = 2.0
"""Seconds that rank 0 goes on listening after a contradiction: who else contradicts?"""
RETRY = 0.2
PROBE = 5.0
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"


class Unreachable(Exception):
    """Rank 0 cannot be reached; only this process can say so."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.value)
        self.finding = finding


@dataclass(frozen=True)
class Verdict:
    """What rank 0 makes of the list. places: everyone on it."""

    places: tuple[Place, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not failed(self.findings)


def open_store(ranks: Ranks, seconds: float) -> dist.Store:
    """The store of rank 0, a server in its process and a client in all others.

    Raises:
        Unreachable: there is none within `seconds`, with the reason.
    """
    # torchrun's agent has opened the port; its store is kept apart from what training writes into it.
    if os.environ.get(AGENT_STORE) == "True":
        return dist.PrefixStore("preflight", connect(ranks, seconds))
    return serve(ranks) if ranks.rank == 0 else connect(ranks, seconds)


def serve(ranks: Ranks) -> dist.Store:
    where = f"{ranks.master_addr}:{ranks.master_port}"
    try:
        # Of several processes on one port only one may listen, or two runs would take each other's ranks.
        return within(2 * PROBE, "opening the store", lambda: tcp_store(ranks, is_master=True, seconds=PROBE))
    except (dist.DistNetworkError, Stuck) as error:
        text = str(error)
        if "EADDRINUSE" in text:
            raise Unreachable(
                Finding(
                    "ranks",
                    "fail",
                    f"port {ranks.master_port} is taken by {listener(ranks.master_port)}",
                    "rank 0 cannot listen, so no rank finds it",
                    "end that process if it is left over or has rank 0, too; or choose another MASTER_PORT",
                    (ranks.rank,),
                )
            ) from None
        raise Unreachable(
            Finding(
                "ranks",
                "fail",
                f"rank 0 does not reach itself at {where}: {first_line(error)}",
                "the other ranks look for it there",
                "set MASTER_ADDR to an address of the machine that runs rank 0",
                (ranks.rank,),
            )
        ) from None


def connect(ranks: Ranks, seconds: float) -> dist.Store:
    deadline = time.monotonic() + seconds
    # Not by TCPStore: it says for any reason that time has passed, and takes twice as long.
    while problem := connection_problem(ranks.master_addr, ranks.master_port, PROBE):
        if time.monotonic() + RETRY > deadline:
            raise absent(ranks, seconds, problem)
        time.sleep(RETRY)
    left = max(PROBE, deadline - time.monotonic())
    try:
        # A store that does not greet back would be waited for without end.
        return within(left, "greeting the store", lambda: tcp_store(ranks, is_master=False, seconds=left))
    except (dist.DistNetworkError, Stuck):
        problem = f"what listens at {ranks.master_addr}:{ranks.master_port} is not rank 0 of a run"
        raise absent(ranks, seconds, problem) from None


def tcp_store(ranks: Ranks, *, is_master: bool, seconds: float) -> dist.Store:
    return dist.TCPStore(
        ranks.master_addr,
        ranks.master_port,
        is_master=is_master,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
    )


def absent(ranks: Ranks, seconds: float, problem: str) -> Unreachable:
    fix = "see in its log whether it was started, and whether MASTER_ADDR and MASTER_PORT are the same everywhere"
    if is_loopback(ranks.master_addr):
        fix = f"MASTER_ADDR={ranks.master_addr} is this machine itself: set the address of rank 0's; {fix}"
    value = f"rank {ranks.rank} did not find rank 0 within {seconds:g} s: {problem}"
    return Unreachable(Finding("ranks", "fail", value, "no rank starts without rank 0", fix, (ranks.rank,)))


def register(board: Board, place: Place) -> int:
    """Put `place` on the list. Returns its number there."""
    number = board.count(ATTENDANCE)
    board.write(f"{ATTENDANCE}/{number}", place)
    return number


def judge(board: Board, expected: int, configured: int, seconds: float) -> Verdict:
    """On rank 0: wait for all, and say what to make of those who came.

    expected: ranks according to rank 0. configured: ranks that the configuration asks for.
    """
    places = take_attendance(board, expected, configured, seconds)
    return Verdict(tuple(places), tuple(judge_attendance(places, expected, configured, seconds)))


def tell(board: Board, verdict: Verdict, number: int) -> None:
    """On rank 0, which is `number` on the list: let the others know."""
    board.write(VERDICT, verdict)
    if not verdict.ok:
        # This process ends now, and with it what the others read.
        heard = {other: f"{HEARD}/{other}" for other in range(len(verdict.places)) if other != number}
        board.read_all(heard, bool, GRACE)


def hear(board: Board, place: Place, number: int, seconds: float) -> Verdict:
    """On every other rank.

    Raises:
        Unreachable: rank 0 says nothing.
    """
    try:
        # Rank 0 may have come as late as it could.
        verdict = board.read(VERDICT, Verdict, 2 * seconds + GRACE)
        board.write(f"{HEARD}/{number}", True)
        return verdict
    except (TimeoutError, ConnectionError) as error:
        value = f"rank {place.rank} registered at rank 0, but heard nothing: {error}"
        raise Unreachable(
            Finding("ranks", "fail", value, "no rank starts without rank 0", "see the log of rank 0", (place.rank,))
        ) from None


def take_attendance(board: Board, expected: int, configured: int, seconds: float) -> list[Place]:
    """Who registers until all of `expected` ranks have, `seconds` pass, or somebody contradicts."""
    places: list[Place] = []
    deadline = time.monotonic() + seconds
    contradicted = False
    while len({place.rank for place in places} & set(range(expected))) < expected or contradicted:
        try:
            places.append(board.read(f"{ATTENDANCE}/{len(places)}", Place, deadline - time.monotonic()))
        except TimeoutError:
            break
        # Whoever is missing would be found out only at the end: a contradiction is enough.
        if not contradicted and contradictions(places, expected, configured):
            contradicted, deadline = True, min(deadline, time.monotonic() + GRACE)
    return places


def judge_attendance(places: Sequence[Place], expected: int, configured: int, seconds: float) -> list[Finding]:
    """expected: how many ranks there are according to rank 0. seconds: how long it waited."""
    findings = contradictions(places, expected, configured)
    came = {place.rank for place in places}
    missing = sorted(set(range(expected)) - came)
    if missing:
        findings.append(
            Finding(
                "ranks",
                "fail",
                f"{numbers(missing)} of {expected} did not come"
                + ("" if findings else f" within {seconds:g} s")
                + likely_hosts(missing, places),
                "no rank starts before all are there",
                "see the log of those processes: were they started, with the same MASTER_ADDR and MASTER_PORT, and "
                "does a firewall let them reach rank 0?",
                tuple(missing),
            )
        )
    if not findings:
        findings.append(Finding("ranks", "ok", f"all {expected} came", ranks=tuple(sorted(came))))
    return findings


def contradictions(places: Sequence[Place], expected: int, configured: int) -> list[Finding]:
    """What cannot be right, whoever else comes."""
    findings = []
    for rank, count in Counter(place.rank for place in places).items():
        if count > 1:
            who = " and ".join(str(place) for place in places if place.rank == rank)
            findings.append(
                Finding(
                    "ranks",
                    "fail",
                    f"rank {rank} came {count} times: {who}",
                    "each rank is one process",
                    "give each machine a node rank of its own, and end what an earlier launch has left",
                    (rank,),
                )
            )
    common = Counter(place.world_size for place in places).most_common(1)[0][0]
    odd = [place for place in places if place.world_size != common]
    for place in odd:
        findings.append(
            Finding(
                "ranks",
                "fail",
                f"rank {place.rank} on {place} believes in {place.world_size} ranks ({place.source}), the others in "
                f"{common}",
                "it waits for another number of ranks than the others",
                "start all machines with the same number of nodes and processes per node",
                (place.rank,),
            )
        )
    if not odd and common != configured:
        findings.append(
            Finding(
                "ranks",
                "fail",
                f"{common} processes were started, but the configuration asks for {configured}",
                "training refuses to start",
                f"start {configured} processes, or choose parallel.* sizes whose product is {common}",
            )
        )
    return findings + shared_devices(places)


def shared_devices(places: Sequence[Place]) -> list[Finding]:
    seats: dict[tuple[str, int], list[Place]] = {}
    for place in Roster(places).places.values():
        seats.setdefault((place.machine, place.local_rank), []).append(place)
    return [
        Finding(
            "ranks",
            "fail",
            f"{numbers([place.rank for place in same])} have local rank {local_rank} on {same[0].host}",
            "they would use one GPU together",
            "let the launcher number the processes of a machine (LOCAL_RANK)",
            tuple(place.rank for place in same),
        )
        for (_, local_rank), same in seats.items()
        if len(same) > 1
    ]


def likely_hosts(missing: Sequence[int], places: Sequence[Place]) -> str:
    """Where the missing ranks should be, as far as ranks of the same machine came: these are neighbours."""
    named = set()
    for place in places:
        first = place.rank - place.local_rank
        if not set(missing).isdisjoint(range(first, first + (place.local_world_size or 1))):
            named.add(place.host)
    return f" ({', '.join(sorted(named))} runs other ranks)" if named else ""
