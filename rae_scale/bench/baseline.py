"""Whether a record is slower than an earlier one, beyond what the noise of both explains.

The rule. A measure is *slower* if both hold: its 10 - 90 % interval lies wholly above the earlier one (so that even its
fast repeats were slower than the earlier slow ones), and its median is more than `threshold` above the earlier median
(so that a tiny but steady difference is no alarm). *Faster* is the same the other way round; anything else is *same*.
A row that was measured then and fails now *fails now*, which counts as a regression as well.

Rows are compared if their settings are equal (`Row.settings_hash`), on the same device only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rae_scale.bench.record import Measure, Record, Row
from rae_scale.bench.results import table

THRESHOLD = 0.03
REGRESSIONS = ("slower", "fails now")

Verdict = Literal["same", "faster", "slower", "fails now"]

COLUMNS = {
    "row": "{row}",
    "measure": "{measure}",
    "then": "{then}",
    "now": "{now}",
    "change": "{change:+.1%}",
    "verdict": "{verdict}",
}
# A difference in these is said beside the comparison, as it may be what has changed.
EXPLAINING = ("commit", "torch", "triton", "deepspeed", "transformers", "cuda", "nccl", "cudnn", "driver", "threads")


@dataclass(frozen=True)
class Change:
    """One measure of one row. then, now: None where a row failed."""

    row: str
    measure: str
    then: Measure | None
    now: Measure | None
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """only_now, only_then: rows without a partner, by name. differences: of the environments."""

    changes: list[Change]
    only_now: list[str]
    only_then: list[str]
    differences: list[str]
    threshold: float

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.verdict in REGRESSIONS]

    def __str__(self) -> str:
        lines = [
            f"Against the baseline: slower or faster means that the 10 - 90 % intervals do not meet and the medians "
            f"differ by more than {self.threshold:.1%}.\n",
            table([cells(change) for change in self.changes], COLUMNS),
            *(f"\nnot in the baseline: {name}" for name in self.only_now),
            *(f"\nin the baseline only: {name}" for name in self.only_then),
            *([f"\ndifferent since then: {'; '.join(self.differences)}"] if self.differences else []),
            f"\n{len(self.regressions)} regression(s) in {len(self.changes)} measure(s)",
        ]
        return "\n".join(lines)


def compare(now: Record, then: Record, threshold: float = THRESHOLD) -> Comparison:
    """
    Raises:
        ValueError: they are not of the same benchmark and device, or have no row in common.
    """
    check_comparable(now, then)
    earlier = {row.settings_hash: row for row in then.rows}
    present = {row.settings_hash for row in now.rows}
    pairs = [(row, earlier[row.settings_hash]) for row in now.rows if row.settings_hash in earlier]
    if not pairs:
        raise ValueError(
            f"no row of the baseline ({then.command}) has the settings of one measured now; "
            f"{first_difference(now, then)}; measure the same settings, or make a new baseline"
        )
    return Comparison(
        changes=[change for row, before in pairs for change in changes_of(row, before, threshold)],
        only_now=[row.name for row in now.rows if row.settings_hash not in earlier],
        only_then=[row.name for row in then.rows if row.settings_hash not in present],
        differences=[
            f"{name} {then.environment.get(name)}, now {now.environment.get(name)}"
            for name in EXPLAINING
            if then.environment.get(name) != now.environment.get(name)
        ],
        threshold=threshold,
    )


def check_comparable(now: Record, then: Record) -> None:
    if then.benchmark != now.benchmark:
        raise ValueError(
            f"the baseline is of `bench {then.benchmark}`, this is `bench {now.benchmark}`; give one of the same kind"
        )
    for name, fix in (
        ("device", "measure a baseline on this device"),
        (
            "power_limit_w",
            "with another power limit it is another device: set it back, or measure a baseline",
        ),
    ):
        before, here = then.environment.get(name), now.environment.get(name)
        if before != here:
            raise ValueError(f"the baseline was measured with {name} {before!r}, this is {here!r}; {fix}")


def changes_of(now: Row, then: Row, threshold: float) -> list[Change]:
    if now.failed:
        return [Change(now.name, name, old, None, "fails now") for name, old in then.measures.items()]
    return [
        Change(now.name, name, then.measures[name], new, verdict(new, then.measures[name], threshold))
        for name, new in now.measures.items()
        if name in then.measures
    ]


def verdict(now: Measure, then: Measure, threshold: float) -> Verdict:
    """See the rule above."""
    if now.low > then.high and now.median > (1 + threshold) * then.median:
        return "slower"
    if now.high < then.low and then.median > (1 + threshold) * now.median:
        return "faster"
    return "same"


def cells(change: Change) -> dict[str, Any]:
    row: dict[str, Any] = {"row": change.row, "measure": change.measure, "verdict": change.verdict}
    row |= {"then": interval(change.then), "now": interval(change.now)}
    if change.then is not None and change.now is not None and change.then.median:
        row["change"] = change.now.median / change.then.median - 1
    return row


def interval(measure: Measure | None) -> str:
    if measure is None:
        return ""
    if measure.unit == "bytes":
        return f"{measure.median / 1e9:.4f} GB"
    return f"{1e3 * measure.median:.3f} ms ({1e3 * measure.low:.3f} - {1e3 * measure.high:.3f})"


def first_difference(now: Record, then: Record) -> str:
    """What to say where nothing matches: the first setting that differs between the first rows."""
    if not now.rows or not then.rows:
        return "one of the two has no rows"
    here, there = dict(leaves(now.rows[0].settings)), dict(leaves(then.rows[0].settings))
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            return f"the first rows differ in {name}: {there.get(name)!r} then, {here.get(name)!r} now"
    return "the first rows are equal"


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
