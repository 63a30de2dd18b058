"""Distributions and counts of a data set as plots: one PNG, or TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rae_scale.data.looking.distribution import Distribution, is_logarithmic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rae_scale.data.looking.stats import Stats

MOST_BARS = 20
COLUMNS = 3
DPI = 120


def save_png(stats: Stats, path: Path) -> None:
    """All panels on one page."""
    from matplotlib.figure import Figure

    names = panels(stats)
    rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(5.0 * COLUMNS, 3.4 * rows), layout="constrained")
    grid = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, name in zip(grid, names, strict=False):
        draw(axes, name, names[name])
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    figure.suptitle(f"{stats.path}: {stats.found.items:,} of {stats.samples:,} samples")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def save_tensorboard(stats: Stats, folder: Path) -> None:
    """A figure for each panel, by its title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, panel in panels(stats).items():
            figure = Figure(figsize=(6.0, 4.0), layout="constrained")
            FigureCanvasAgg(figure)
            draw(figure.subplots(), name, panel)
            writer.add_figure(name, figure, close=False)


def panels(stats: Stats) -> dict[str, Distribution | Mapping[str, int]]:
    """By title; what is empty is left out."""
    counts: dict[str, Mapping[str, int]] = {
        "samples by corpus": stats.by_corpus,
        "image formats": stats.found.formats,
        "left out when built": stats.left_out,
        "cannot be used": stats.found.rejected,
    }
    both: dict[str, Distribution | Mapping[str, int]] = {**stats.found.distributions, **counts}
    return {name: panel for name, panel in both.items() if len(panel)}


def draw(axes: Axes, name: str, panel: Distribution | Mapping[str, int]) -> None:
    if isinstance(panel, Distribution):
        draw_distribution(axes, panel)
    else:
        draw_counts(axes, panel)
    axes.set_title(name, fontsize="medium")


def draw_distribution(axes: Axes, distribution: Distribution) -> None:
    edges, counts = distribution.histogram()
    if len(counts) == 1:  # all are the same: a bar needs a width
        axes.bar([f"{edges[0]:g}"], counts, width=0.2)
        axes.set_xlim(-1, 1)
    else:
        axes.stairs(counts, edges, fill=True)
        if is_logarithmic(edges):
            axes.set_xscale("symlog", linthresh=max(edges[1], 1e-9))
        axes.axvline(distribution.quantile(0.5), color="black", linewidth=0.8, linestyle="--", label="median")
        axes.legend(fontsize="x-small")
    axes.set_ylabel("count")


def draw_counts(axes: Axes, counts: Mapping[str, int]) -> None:
    largest = sorted(counts.items(), key=lambda pair: -pair[1])
    if len(largest) > MOST_BARS:
        rest = largest[MOST_BARS - 1 :]
        largest = [*largest[: MOST_BARS - 1], (f"{len(rest)} others", sum(count for _, count in rest))]
    names = [name for name, _ in reversed(largest)]
    axes.barh(range(len(names)), [count for _, count in reversed(largest)])
    axes.set_yticks(range(len(names)), names, fontsize="x-small")
    axes.set_ylim(-1, max(len(names), 3))
    axes.set_xlabel("samples")
