"""Pictures of records: bars with their spread, and lines over a quantity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rae_scale.bench.record import Record, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[[Record, Path], None]
DPI = 120
BAR_HEIGHT = 0.35  # inches


def bars(*names: str) -> Draw:
    """Medians of these measures in milliseconds, the line over each bar from the first to the ninth decile."""

    def draw(record: Record, path: Path) -> None:
        found = [
            (f"{row.name}: {name}" if len(names) > 1 else row.name, row.measures[name])
            for row in record.rows
            for name in names
            if name in row.measures
        ]
        figure, axes = new_axes(record, height=1.2 + BAR_HEIGHT * len(found))
        places = range(len(found), 0, -1)  # the first row at the top
        medians = [1e3 * measure.median for _, measure in found]
        spread = [
            [1e3 * (measure.median - measure.low) for _, measure in found],
            [1e3 * (measure.high - measure.median) for _, measure in found],
        ]
        axes.barh(list(places), medians, xerr=spread, capsize=3)
        axes.set_yticks(list(places), [label for label, _ in found])
        axes.set_xlabel(f"{', '.join(names)}: ms, median and 10 - 90 %")
        save(figure, path)

    return draw


def lines(x: str, y: str, series: Callable[[Row], str], labels: tuple[str, str], *, log: bool) -> Draw:
    """A line for each of the `series`, through the rows' values of x and y. labels: of the two axes."""

    def draw(record: Record, path: Path) -> None:
        figure, axes = new_axes(record, height=4.0)
        rows = [(row, row.flat()) for row in record.rows if row.measures]
        for name in dict.fromkeys(series(row) for row, _ in rows):
            mine = sorted((flat[x], flat[y]) for row, flat in rows if series(row) == name)
            axes.plot([a for a, _ in mine], [b for _, b in mine], marker="o", label=name)
        if log:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        ticks(axes, (flat[x] for _, flat in rows))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        save(figure, path)

    return draw


def ticks(axes: Axes, values: Iterable[Any]) -> None:
    """Only where something was measured, if that is not too much."""
    found = sorted(set(values))
    if len(found) <= 10:
        axes.set_xticks(found, [f"{value:,}" for value in found], rotation=30 if len(found) > 5 else 0)
        axes.minorticks_off()


def new_axes(record: Record, height: float) -> tuple[Figure, Axes]:
    # The object and not pyplot: no window system is looked for, and no figure outlives its picture.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"{record.benchmark} on {record.environment['device']}, {record.date[:10]}", fontsize="medium")
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
