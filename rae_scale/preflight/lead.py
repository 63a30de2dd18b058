"""The order of things on rank 0: ask all ranks, judge, and measure only what can be measured."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rae_scale.preflight.actions import (
    CLOCK_SECONDS,
    FACTS_SECONDS,
    GROUP_SECONDS,
    MEASURE_SECONDS,
    PAIRS_SECONDS,
    SHORT_SECONDS,
    Actions,
)
from rae_scale.preflight.checks_gpu import check_gpus
from rae_scale.preflight.checks_host import check_hosts, judge_stuck
from rae_scale.preflight.checks_rates import judge_bandwidth, judge_compute
from rae_scale.preflight.checks_same import check_same, judge_shared, odd_ranks
from rae_scale.preflight.clock import Offset, judge_clocks
from rae_scale.preflight.crew import Crew
from rae_scale.preflight.facts import Facts
from rae_scale.preflight.files import MARK
from rae_scale.preflight.finding import Finding, failed, size
from rae_scale.preflight.measure import Computed, Reduced
from rae_scale.preflight.needs import Needs, needs_of
from rae_scale.preflight.pairs import judge_pairs, pair_rounds

BLOCKING = {"ranks", "config", "code", "versions", "gpu", "gpu-model", "dns", "plan"}
"""Where one of these fails, a process group would fail or hang, or measure another run."""
Details = tuple[dict[str, str], dict[str, str]]


class Lead:
    """Collects findings. Of checks that were not selected none is kept; that a rank gave no answer always is."""

    def __init__(self, crew: Crew, actions: Actions, network: str | None) -> None:
        self._crew, self._actions, self._network = crew, actions, network
        self._config, self._roster = actions.config, actions.roster
        self._several = len(self._roster.places) > 1
        self.findings: list[Finding] = []

    def run(self) -> list[Finding]:
        every = list(self._ask("facts", "ranks", Facts, seconds=FACTS_SECONDS).values())
        if len(every) == len(self._roster.places):
            self._judge_facts(every)
            if self._several:
                self._compare_machines()
            self._measure()
        return self.findings

    def _judge_facts(self, every: Sequence[Facts]) -> None:
        needs = self._needs() if self._wanted("plan", "gpu-memory", "host-memory", "shm", "disk") else None
        self._keep(judge_stuck(every))
        self._keep(check_gpus(every, needs, self._config.run.device))
        self._keep(check_hosts(every, self._roster.machines, needs))
        odd = odd_ranks(every)
        found = self._ask("details", "config", Details, odd, seconds=SHORT_SECONDS) if odd else {}
        self._keep(check_same(every, {rank: details for rank, details in found.items() if details is not None}))

    def _needs(self) -> Needs | None:
        try:
            needs = needs_of(self._config)
        except ValueError as error:
            fix = "correct the configuration; `rae-scale plan` says the same"
            self._keep([Finding("plan", "fail", str(error), "training cannot be set up", fix)])
            return None
        value = f"{size(needs.gpu)} of device memory per rank, a checkpoint of {size(needs.checkpoint)}"
        self._keep([Finding("plan", "ok", value)])
        return needs

    def _compare_machines(self) -> None:
        if self._wanted("shared-dir") and not self._failed("run-dir"):
            seen = self._look_for_mark()
            self._keep(judge_shared(seen, self._config.run.dir, self._roster.machines))
        if self._wanted("clock"):
            leaders = [rank for rank in self._roster.leaders if rank != 0]
            found = self._ask("clock", "clock", dict[int, Offset], leaders, seconds=CLOCK_SECONDS)
            if found.get(0) is not None:
                self._keep(judge_clocks(found[0], self._roster.machines))

    def _look_for_mark(self) -> dict[int, str]:
        token = secrets.token_hex(8)
        path = Path(self._config.run.dir) / f"{MARK}{token}"
        path.write_text(token)
        try:
            return self._ask("mark", "shared-dir", str, token, seconds=SHORT_SECONDS)
        finally:
            path.unlink(missing_ok=True)

    def _measure(self) -> None:
        if not self._wanted("group", "compute", "bandwidth", "pairs"):
            return
        broken = [check for check in sorted(BLOCKING) if self._failed(check)]
        if broken:
            why = f"it would fail or hang: first mend {', '.join(broken)}"
            self._keep([Finding("group", "warn", "not tried, and nothing measured", why)])
            return
        if self._several:
            made = self._ask("group", "group", type(None), seconds=GROUP_SECONDS)
            if len(made) < len(self._roster.places):
                return
            self._keep([Finding("group", "ok", "all ranks reach each other", ranks=tuple(made))])
        device = self._compute() if self._wanted("compute", "bandwidth") else None
        if not self._several:
            return
        slow = self._bandwidth(device) if device is not None and self._wanted("bandwidth") else False
        if slow or self._actions.selection == {"pairs"}:
            self._pairs()

    def _compute(self) -> str | None:
        """The device's name; None if a rank failed."""
        found: dict[int, Computed] = self._ask("compute", "compute", Computed, seconds=MEASURE_SECONDS)
        if len(found) < len(self._roster.places):
            return None
        self._keep(judge_compute(found))
        return found[0].device

    def _bandwidth(self, device: str) -> bool:
        """Whether it is worth finding out who is slow."""
        found: dict[int, Reduced] = self._ask("reduce", "bandwidth", Reduced, seconds=MEASURE_SECONDS)
        if len(found) < len(self._roster.places):
            return False
        finding, slow = judge_bandwidth(found[0], device, self._roster.machines, self._network)
        self._keep([finding])
        return slow

    def _pairs(self) -> None:
        rounds = pair_rounds(self._roster.machines)
        found = self._ask("pairs", "pairs", dict[str, float], rounds, seconds=PAIRS_SECONDS)
        rates = {}
        for own in found.values():
            for pair, rate in own.items():
                first, second = map(int, pair.split("-"))
                rates[first, second] = rate
        if rates:
            self._keep(judge_pairs(rates, self._roster))

    def _ask(self, name: str, check: str, kind: Any, argument: Any = None, *, seconds: float) -> dict[int, Any]:
        """Values by rank. A rank without one is a finding of `check`."""
        answers = self._crew.order(name, kind, argument, seconds=seconds)
        for rank, problem in answers.problems.items():
            fix = "see the log of that rank"
            self.findings.append(Finding(check, "fail", f"{name}: {problem}", "training would end there", fix, (rank,)))
        return dict(answers.values)

    def _keep(self, findings: Iterable[Finding]) -> None:
        self.findings += [finding for finding in findings if self._wanted(finding.check)]

    def _wanted(self, *checks: str) -> bool:
        return not self._actions.selection.isdisjoint(checks)

    def _failed(self, check: str) -> bool:
        return failed(finding for finding in self.findings if finding.check == check)
