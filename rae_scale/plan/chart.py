"""Pictures of plans: memory by phase and component, and throughput over numbers of GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rae_scale.bench.chart import save
from rae_scale.plan.plan import Plan
from rae_scale.plan.report import GIB, components, engine_words

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Name -> points (GPUs, value)."""


def memory_chart(plan: Plan, path: Path) -> None:
    """A bar for each phase, stacked by component, under the line of the GPU's memory."""
    from matplotlib.figure import Figure

    memory = plan.memory
    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axes = figure.subplots()
    phases = list(memory.phases)
    bottom = [0.0] * len(phases)
    for name in components(plan):
        heights = [memory.phases[phase].get(name, 0) / GIB for phase in phases]
        axes.bar(phases, heights, bottom=bottom, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.bar(phases, [memory.margin / GIB] * len(phases), bottom=bottom, label="margin", color="none", edgecolor="gray")
    limit = plan.cluster.gpu.memory_bytes / GIB
    axes.axhline(limit, color="black", linestyle="--", label=f"{plan.cluster.gpu.name}: {limit:.1f} GiB")
    axes.set_ylabel("GiB on the fullest rank, predicted")
    axes.set_title(
        f"{plan.config.model.name}, {engine_words(plan.config)} on {plan.cluster.gpus} GPUs, "
        f"micro-batch {plan.micro_batch}",
        fontsize="medium",
    )
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def scaling_chart(panels: Mapping[str, Curves], ylabel: str, title: str, path: Path) -> None:
    """A panel for each network, a line for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.5), layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (network, curves) in zip(row, panels.items(), strict=True):
        for name, points in curves.items():
            axes.plot([gpus for gpus, _ in points], [value for _, value in points], marker="o", label=name)
        counts = sorted({gpus for points in curves.values() for gpus, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("GPUs")
        axes.set_title(network, fontsize="medium")
        axes.grid(alpha=0.3)
    row[0].set_ylabel(ylabel)
    row[-1].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    save(figure, path)
