"""Effective training time: the part of a run's wall time that went into steps which its result contains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rae_scale.train.watch.clock import COMPUTE, SKIPPED, Phase

CAUSES = {
    "start": "start-up",
    "data": "data wait",
    "save": "save stall",
    "evaluation": "evaluation",
    "skipped": "skipped steps",
    "repeated": "repeated steps",
    "interrupted": "stalls and cut-off steps",
    "down": "down between attempts",
}
"""What else the time goes into, and how the report calls it."""

OF_CLOCK = (Phase.START, Phase.DATA, Phase.SAVE, Phase.EVALUATION, SKIPPED)


@dataclass
class Segment:
    """Seconds of computing from step `first` to step `last`."""

    first: int
    last: int
    seconds: float


@dataclass
class Accounts:
    """Adds up the events of a run (`journal.py`), one after the other.

    What an attempt computed beyond the step that the next one begins at was for nothing: `repeated`. What its clock has
    not counted when it ends, the step that was under way or a stall, is `interrupted`.

    wall_s:   from the beginning of the first attempt to the last event, without the time after a run had finished.
    lost:     seconds by the keys of `CAUSES`; with `productive_s` they add up to `wall_s`.
    attempts, steps: how many began, and how far the last one is.
    """

    attempts: int = 0
    steps: int = 0
    wall_s: float = 0.0
    lost: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    _kept: list[Segment] = field(default_factory=list)
    _last: Mapping[str, Any] | None = None
    _ready: bool = False
    _uncounted: float = 0.0

    @property
    def productive_s(self) -> float:
        return sum(segment.seconds for segment in self._kept)

    @property
    def effective(self) -> float:
        """Productive over wall time."""
        return self.productive_s / self.wall_s if self.wall_s > 0 else 0.0

    def effective_at(self, time: float, computed_s: float) -> float:
        """`effective` while an attempt runs: at `time`, when it has computed for `computed_s` seconds so far."""
        assert self._last is not None, "no attempt runs"
        wall_s = self.wall_s + max(0.0, time - self._last["time"])
        productive_s = self.productive_s + computed_s - self._last["seconds"].get(COMPUTE, 0.0)
        return productive_s / wall_s if wall_s > 0 else 0.0

    def add(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "begin":
            self._begin(event)
            return
        if self._last is None:
            raise ValueError(f"events.jsonl begins with {kind!r}, not with an attempt; its first lines are missing")
        before = self._last["seconds"]
        spent = {cause: seconds - before.get(cause, 0.0) for cause, seconds in event["seconds"].items()}
        for cause in OF_CLOCK:
            self.lost[cause] += spent.get(cause, 0.0)
        self._pass_time(event, sum(spent.values()))
        if kind == "ready":
            self._ready = True
            self._go_on_from(event["step"])
        elif self._ready:
            reached = event.get("from_step", event["step"])
            self._kept.append(Segment(self.steps, reached, spent.get(COMPUTE, 0.0)))
            self._go_on_from(event["step"])

    def _begin(self, event: Mapping[str, Any]) -> None:
        self._settle()
        # Whoever starts a finished run again has not lost the time since.
        if self._last is not None and self._last.get("state") != "finished":
            down = max(0.0, event["time"] - self._last["time"])
            self.lost["down"] += down
            self.wall_s += down
        self._last = event
        self._ready = False
        self.attempts += 1

    def _pass_time(self, event: Mapping[str, Any], counted: float) -> None:
        assert self._last is not None
        elapsed = max(0.0, event["time"] - self._last["time"])
        self.wall_s += elapsed
        # A phase that an event falls into is counted by the next one, so only the sum over an attempt means something.
        self._uncounted += elapsed - counted
        self._last = event
        if event["event"] in ("end", "lost"):
            self._settle()

    def _settle(self) -> None:
        self.lost["interrupted" if self._ready else "start"] += max(0.0, self._uncounted)
        self._uncounted = 0.0

    def _go_on_from(self, step: int) -> None:
        """What was computed beyond `step` will be computed again."""
        self.steps = step
        while self._kept and self._kept[-1].last > step:
            segment = self._kept.pop()
            kept_s = 0.0
            if step > segment.first:
                kept_s = segment.seconds * (step - segment.first) / (segment.last - segment.first)
                self._kept.append(Segment(segment.first, step, kept_s))
            self.lost["repeated"] += segment.seconds - kept_s


def account(events: Iterable[Mapping[str, Any]]) -> Accounts:
    accounts = Accounts()
    for event in events:
        accounts.add(event)
    return accounts
