"""Which ranks the others wait for, told from the heartbeats of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rae_scale.train.watch.clock import ORDER, Phase
from rae_scale.train.watch.heartbeat import Heartbeat

MISSED_BEATS = 3
MOST_NAMED = 8


@dataclass(frozen=True)
class Culprits:
    """silent: ranks without a fresh heartbeat: dead, stopped, or on a lost node. behind: at an earlier step or phase
    than others. elsewhere: as far as the others, but not among those that wait for other ranks."""

    silent: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    elsewhere: tuple[int, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """The strongest suspicion there is."""
        return self.silent or self.behind or self.elsewhere


def find_culprits(beats: Mapping[int, Heartbeat], ranks: Iterable[int], now: float, stale_s: float) -> Culprits:
    """Among `ranks`. beats: theirs, of this attempt. now: seconds since 1970. stale_s: an age that no heartbeat reaches
    while its rank lives."""
    fresh = {rank: beat for rank, beat in beats.items() if now - beat.time <= stale_s}
    silent = tuple(rank for rank in ranks if rank not in fresh)
    places = {rank: (beat.step, ORDER[Phase(beat.phase)]) for rank, beat in fresh.items()}
    furthest = max(places.values(), default=None)
    behind = tuple(rank for rank, place in places.items() if place != furthest)
    if behind:  # those that are the furthest behind hold up those between
        last = min(places[rank] for rank in behind)
        behind = tuple(rank for rank in behind if places[rank] == last)
    working = tuple(rank for rank, beat in fresh.items() if not beat.waiting)
    return Culprits(silent, behind, working if len(working) < len(fresh) else ())


def time_left(beats: Mapping[int, Heartbeat], culprits: Culprits, now: float) -> float:
    """Seconds until all ranks that are behind are out of time themselves: a rank that saves may take longer than the
    others' step. Not above 0: they are."""
    return max((beats[rank].since + beats[rank].time_out - now for rank in culprits.behind), default=0.0)


def describe(culprits: Culprits, beats: Mapping[int, Heartbeat], now: float) -> str:
    """One or more lines: who is to blame, where, and what the others do."""
    lines = []
    for ranks, what in (
        (culprits.silent, "without a heartbeat (dead, stopped, or its node is lost)"),
        (culprits.behind, "behind the others"),
        (culprits.elsewhere, "not where the others wait"),
    ):
        lines += [f"{named(rank, beats, now)}: {what}" for rank in ranks[:MOST_NAMED]]
        if len(ranks) > MOST_NAMED:
            lines.append(f"and {len(ranks) - MOST_NAMED} more {what}")
    if not lines:
        lines.append("no rank stands out: all wait for each other, or in different collectives")
    blamed = {*culprits.silent, *culprits.behind, *culprits.elsewhere}
    lines += gathered(beat for rank, beat in beats.items() if rank not in blamed)
    return "\n".join(lines)


def named(rank: int, beats: Mapping[int, Heartbeat], now: float) -> str:
    beat = beats.get(rank)
    if beat is None:
        return f"rank {rank}"
    where = f", {beat.where}" if beat.where else ""
    place = f"step {beat.step + 1}, {beat.phase} for {now - beat.since:.0f} s"
    return f"rank {rank} on {beat.host} ({place}{where})"


def gathered(beats: Iterable[Heartbeat]) -> list[str]:
    """The others, by where they are: `7 ranks: step 12, step, mesh.py:118 any`."""
    places = Counter(f"step {beat.step + 1}, {beat.phase}, {beat.where or 'place unknown'}" for beat in beats)
    return [f"{count} rank(s): {place}" for place, count in places.most_common(MOST_NAMED)]
