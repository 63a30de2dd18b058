"""`rae-scale preflight`: one process per rank, or one alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rae_scale.config import Config
from rae_scale.parallel.ranks import Ranks, resolve_ranks
from rae_scale.plan.hardware import NETWORKS, named
from rae_scale.preflight.actions import Actions
from rae_scale.preflight.board import Board
from rae_scale.preflight.clock import Clock
from rae_scale.preflight.crew import Crew
from rae_scale.preflight.finding import Finding, failed, merged, selected
from rae_scale.preflight.lead import Lead
from rae_scale.preflight.place import Place, Roster, own_place
from rae_scale.preflight.rendezvous import Unreachable, hear, judge, open_store, register, tell
from rae_scale.preflight.report import to_json, to_text


@dataclass(frozen=True)
class Options:
    """only, skip: names of checks; no `only` is all. seconds: that ranks have to come. network: what joins machines, by
    the planner's names; None is what such machines usually have."""

    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    seconds: float = 120.0
    network: str | None = None


@dataclass(frozen=True)
class Outcome:
    """world_size: of the run; roster: the ranks that came."""

    findings: Sequence[Finding]
    roster: Roster
    world_size: int

    @property
    def success(self) -> bool:
        return not failed(self.findings)

    def to_text(self) -> str:
        return to_text(self.findings, self.roster, self.world_size)

    def to_json(self) -> dict[str, Any]:
        return to_json(self.findings, self.roster, self.world_size)


Show = Callable[[Outcome], None]


def preflight(config: Config, options: Options, show: Show, clock: Clock = time.time) -> bool:
    """Look for what would stop or slow the run of `config`, and say whether it may start. Every process of the run
    calls this, or one alone.

    show: called with all findings on rank 0, and on a rank that did not reach it with its own. Called before any other
        process can end: launchers end a rank when another one fails.

    Nothing is waited for without end. Makes run.dir, and writes there what it removes again.

    Raises:
        ValueError: the launcher's variables contradict each other, or an option names nothing.
    """
    selection = selected(options.only, options.skip)
    if options.network is not None:
        named("network", options.network, NETWORKS)
    ranks = resolve_ranks(os.environ, config.parallel.world_size)
    place = own_place(ranks)
    if ranks.world_size == 1:
        return alone(config, options, ranks, place, selection, show)
    roster = Roster([place])
    try:
        store = open_store(ranks, options.seconds)
        board = Board(store)
        number = register(board, place)
        if place.rank != 0:
            verdict = hear(board, place, number, options.seconds)
            roster = Roster(verdict.places)
            actions = Actions(config, place, roster, selection, store, clock)
            return verdict.ok and Crew(board, place.rank, place.world_size, actions.table()).follow()
    except (Unreachable, TimeoutError, ConnectionError) as error:
        show(Outcome((lost(error, place),), roster, ranks.world_size))
        return False
    verdict = judge(board, place.world_size, config.parallel.world_size, options.seconds)
    roster = Roster(verdict.places)
    if not verdict.ok:
        show(Outcome(merged(verdict.findings), roster, ranks.world_size))
        tell(board, verdict, number)
        return False
    tell(board, verdict, number)
    actions = Actions(config, place, roster, selection, store, clock)
    crew = Crew(board, place.rank, place.world_size, actions.table())
    outcome = Outcome(
        merged([*verdict.findings, *Lead(crew, actions, options.network).run()]), roster, ranks.world_size
    )
    show(outcome)
    crew.dismiss(outcome.success)
    return outcome.success


def lost(error: Exception, place: Place) -> Finding:
    """What a rank says that has no rank 0 to say it."""
    if isinstance(error, Unreachable):
        return error.finding
    return Finding("ranks", "fail", f"rank {place.rank}: {error}", "", "see the log of rank 0", (place.rank,))


def alone(config: Config, options: Options, ranks: Ranks, place: Place, selection: set[str], show: Show) -> bool:
    """This machine only, of however many the run will have."""
    roster = Roster([place])
    configured = config.parallel.world_size
    actions = Actions(config, place, roster, selection, None)
    findings = [attendance_of_one(ranks, configured)]
    if not failed(findings):
        findings += Lead(Crew(None, 0, 1, actions.table()), actions, options.network).run()
    outcome = Outcome(merged(findings), roster, configured)
    show(outcome)
    return outcome.success


def attendance_of_one(ranks: Ranks, configured: int) -> Finding:
    if configured == 1:
        return Finding("ranks", "ok", "one process, as configured", ranks=(0,))
    if ranks.launched:
        return Finding(
            "ranks",
            "fail",
            f"{ranks.source} has started 1 process, but the configuration asks for {configured}",
            "training refuses to start",
            f"start {configured} processes, or choose parallel.* sizes whose product is 1",
            (0,),
        )
    return Finding("ranks", "ok", f"without a launcher: 1 of {configured} looks at its machine only", ranks=(0,))
