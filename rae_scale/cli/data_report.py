"""How what `rae-scale data inspect | verify | stats` found is printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rae_scale.data.looking.distribution import Distribution
    from rae_scale.data.looking.inspect import InspectReport
    from rae_scale.data.looking.stats import Stats
    from rae_scale.data.looking.units import UnitCounts
    from rae_scale.data.looking.verify import VerifyReport

SHOWN = 20


def print_counts(counts: Iterable[tuple[str, int]]) -> None:
    for name, count in counts:
        if count:
            print(f"  {count:>12,}  {name}")


def print_inspected(report: InspectReport) -> None:
    shards = f" in {report.shards:,} shards" if report.shards else ""
    print(f"{report.path}: {report.kind}, {report.samples:,} samples{shards}, {report.bytes / 2**20:,.1f} MiB")
    if report.damage:
        print(f"damaged: {report.damage}")
    if report.inputs:
        print(f"{report.units.units if report.units else 0:,} of {report.inputs:,} inputs are built; {NOT_DONE}")
    if report.units is not None:
        print_units(report.units)
    found = report.found
    if found.items < report.samples and not report.inputs:
        print(f"examined {found.items:,} of them, evenly spaced:")
    if report.kind not in ("mds", "partial build"):
        print_counts(found.layouts.most_common())
    print_counts([(f"{name} images", count) for name, count in found.formats.most_common()])
    print_counts([("text only", found.text_only), ("conversations", found.conversations), ("captions", found.captions)])
    print_counts([(f"rejected: {reason}", count) for reason, count in found.rejected.most_common()])
    for name, values in found.distributions.items():
        if len(values):
            median = values.quantile(0.5)
            print(f"  {name}: {values.least:,.4g} to {values.most:,.4g}, median {median:,.4g}")
    for shown in found.previews:
        print(f"  {shown.key}  [{shown.image}]  {shown.text[:100]}")


NOT_DONE = "run the same build again to go on"


def print_units(units: UnitCounts) -> None:
    counts = units.counts
    rejected = counts.rejected.total()
    print(
        f"manifests of {units.units:,} units: {counts.read:,} read = {counts.kept:,} kept + {rejected:,} rejected + "
        f"{counts.duplicates:,} duplicates"
    )
    print_counts([(f"rejected: {reason}", count) for reason, count in counts.rejected.most_common()])
    print_some("damaged input of unit", [f"{unit}: {damage}" for unit, damage in units.damaged.items()])
    print_some("no manifest", units.missing)


def print_some(title: str, lines: list[str]) -> None:
    for line in lines[:SHOWN]:
        print(f"{title}: {line}")
    if len(lines) > SHOWN:
        print(f"{title}: and {len(lines) - SHOWN:,} more")


def print_verified(report: VerifyReport) -> None:
    checked, part = report.checked, report.part
    share = f", part {part.index} of {part.count}" if part.count > 1 else ""
    images = f", {checked.images:,} images decoded" if report.decoded else ""
    print(
        f"{report.source}{share}: {checked.samples:,} samples read in {checked.shards:,} shards, "
        f"{checked.bytes / 2**20:,.1f} MiB{images}"
    )
    if report.units.units:
        print_units(report.units)
    if checked.unhashed:
        print(f"{checked.unhashed:,} shards have no hash in the index: a flipped bit in them is seen only by --decode")
    problems = report.problems
    for problem in problems.listed[:SHOWN]:
        print(f"bad: {problem}")
    if len(problems) > SHOWN:
        print(f"bad: and {len(problems) - SHOWN:,} more; the report (--out) lists {len(problems.listed):,}")
    print_counts(problems.counts.most_common())
    print("damaged" if problems else "intact")


def print_stats(found: Stats) -> None:
    examined = found.found
    print(f"{found.path}: {found.samples:,} samples, {examined.items:,} examined")
    columns = ("least", "p5", "median", "p95", "most", "mean")
    print(f"{'':<26}" + "".join(f"{name:>12}" for name in columns))
    for name, values in examined.distributions.items():
        if len(values):
            print(f"{name:<26}" + "".join(f"{number:>12,.5g}" for number in row(values)))
    print_counts([(f"{name} images", count) for name, count in examined.formats.most_common()])
    print_counts([("text only", examined.text_only), ("conversations", examined.conversations)])
    print_counts([(f"cannot be used: {reason}", count) for reason, count in examined.rejected.most_common()])
    print_counts([(f"left out when built: {reason}", count) for reason, count in found.left_out.most_common()])
    print_counts([(f"samples of {corpus}", count) for corpus, count in found.by_corpus.most_common()])


def row(values: Distribution) -> tuple[float, ...]:
    low, median, high = (values.quantile(share) for share in (0.05, 0.5, 0.95))
    return values.least, low, median, high, values.most, values.mean
