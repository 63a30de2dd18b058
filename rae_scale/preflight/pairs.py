"""Which pairs of ranks exchange data when, and which rank or link their times accuse."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from rae_scale.preflight.finding import Finding
from rae_scale.preflight.place import Roster, numbers

SLOW = 0.6
"""Of the median of pairs of the same sort."""
GUILTY = 0.5
"""A rank with more than this fraction of its pairs slow is at fault, not the other ends."""
BETWEEN, INSIDE = "between machines", "inside machines"
GB = 1e9

Pair = tuple[int, int]


def pair_rounds(machines: Sequence[Sequence[int]]) -> list[list[Pair]]:
    """Every machine with every other one, ranks with the same place on them at once, as in a ring over their adapters;
    then every rank with every other one of its machine.

    machines: the ranks of each.
    """
    between = [
        [pair for one, other in games for pair in zip(machines[one], machines[other], strict=False)]
        for games in tournament(len(machines))
    ]
    largest = max(len(ranks) for ranks in machines)
    inside = [
        [(ranks[one], ranks[other]) for ranks in machines for one, other in games if max(one, other) < len(ranks)]
        for games in tournament(largest)
    ]
    return [sorted((min(pair), max(pair)) for pair in pairs) for pairs in (*between, *inside) if pairs]


def tournament(count: int) -> list[list[Pair]]:
    """Rounds in which each of `count` players meets each other one once: one stays, the others move around it."""
    players: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        games = zip(players[:half], reversed(players[half:]), strict=True)
        rounds.append([(one, other) for one, other in games if one is not None and other is not None])
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


def judge_pairs(rates: Mapping[Pair, float], roster: Roster) -> Iterator[Finding]:
    """rates: bytes/s. Pairs inside a machine and between machines are held against their own kind."""
    sorts: dict[str, dict[Pair, float]] = {BETWEEN: {}, INSIDE: {}}
    for (one, other), rate in rates.items():
        same = roster.places[one].machine == roster.places[other].machine
        sorts[INSIDE if same else BETWEEN][one, other] = rate
    for name, some in sorts.items():
        if some:
            yield from judge_sort(some, name, roster)


def judge_sort(rates: Mapping[Pair, float], sort: str, roster: Roster) -> Iterator[Finding]:
    median = statistics.median(rates.values())
    slow = {pair for pair, rate in rates.items() if rate < SLOW * median}
    ranks = tuple(sorted({rank for pair in rates for rank in pair}))
    guilty = set()
    for rank in ranks:
        own = [pair for pair in rates if rank in pair]
        # One pair accuses both of its ends.
        if len(own) > 1 and sum(pair in slow for pair in own) > GUILTY * len(own):
            guilty.add(rank)
    for rank in sorted(guilty):
        worst = min(rate for pair, rate in rates.items() if rank in pair)
        where = "network adapter or cable" if sort == BETWEEN else "NVLink or PCIe"
        yield Finding(
            "pairs",
            "fail",
            f"{sort}: slow with most others, down to {worst / GB:.2f} GB/s, the median is {median / GB:.2f}",
            "every collective goes at the pace of the slowest rank",
            f"see to the {where} of this GPU, or leave its machine out",
            (rank,),
        )
    for pair in sorted(slow):
        if not guilty.intersection(pair):
            one, other = (roster.host(rank) for rank in pair)
            yield Finding(
                "pairs",
                "fail",
                f"{sort}: {numbers(pair)} ({one} to {other}) {rates[pair] / GB:.2f} GB/s, the median is "
                f"{median / GB:.2f}",
                "every collective goes at the pace of the slowest link",
                "see to the switch or cable between them",
                pair,
            )
    if not slow:
        yield Finding("pairs", "ok", f"{sort}: {median / GB:.2f} GB/s, none is much slower", ranks=ranks)
