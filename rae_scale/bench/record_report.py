"""A record as files: NAME.json, NAME.md and NAME.png."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rae_scale.bench.harness import Benchmark
from rae_scale.bench.record import Record, Row
from rae_scale.bench.results import cell, table, write

MACHINE = ("device", "device_count", "capability", "memory_bytes", "power_limit_w", "driver", "cpu", "cpus", "threads")
SOFTWARE = ("torch", "triton", "deepspeed", "transformers", "cuda", "nccl", "cudnn", "python", "kernels", "commit")
FAILED = {"failed": "{failed}"}


def to_markdown(benchmark: Benchmark, record: Record) -> str:
    """The report: where, what, and a table with a line for each row and a column for what some row has."""
    rows = [row.flat() for row in record.rows]
    possible = {**benchmark.columns, **FAILED}
    columns = {heading: text for heading, text in possible.items() if any(cell(row, text) for row in rows)}
    lines = [
        f"## {benchmark.title}",
        "",
        *([f"**{record.note}**", ""] if record.note else []),
        f"`{record.command}`, {record.date}",
        "",
        f"machine: {listed(record.environment, MACHINE)}  ",
        f"software: {listed(record.environment, SOFTWARE)}",
        *absent(record),
        *shared_facts(record.rows),
        "",
        table(rows, columns),
        *(f"\n{note}" for note in benchmark.notes(record)),
    ]
    return "\n".join(lines)


def write_files(benchmark: Benchmark, record: Record, folder: Path) -> None:
    """JSON and markdown; after every row, so that they are there whatever happens to the next."""
    write(folder, benchmark.name, record.to_json(), to_markdown(benchmark, record))


def write_chart(benchmark: Benchmark, record: Record, folder: Path) -> None:
    """The picture, and the report with the picture in it. Without anything measured there is none."""
    if not any(row.measures for row in record.rows):
        return
    name = f"{benchmark.name}.png"
    benchmark.chart(record, folder / name)
    write(folder, benchmark.name, record.to_json(), f"{to_markdown(benchmark, record)}\n\n![{benchmark.title}]({name})")


def listed(found: dict[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{name} {found[name]}" for name in names if found.get(name) is not None)


def absent(record: Record) -> list[str]:
    """Once, what this machine does not tell."""
    if record.environment.get("power_limit_w") is not None:
        return []
    why = "no GPU" if record.environment.get("cuda") is None else "nvidia-smi tells none"
    return ["", f"power: not read ({why})"]


def shared_facts(rows: list[Row]) -> list[str]:
    """What is the same in all rows; what is not is in the table or in the JSON file."""
    facts = [row.facts for row in rows if row.facts]
    if not facts:
        return []
    same = {name: value for name, value in facts[0].items() if all(fact.get(name) == value for fact in facts)}
    lines = [f"precision {same['precision']}"] if same.get("precision") else []
    lines += [f"kernels {same['kernels']}"] if same.get("kernels") else []
    if "layout" in same:
        axes = " x ".join(f"{name} {size}" for name, size in same["layout"].items())
        lines.append(f"{same['world_size']} process(es): {axes}")
    if same.get("flops"):
        flops = same["flops"]
        counted = "counted" if flops["encoder_counted"] else "not counted"
        lines.append(f"{flops['formula']}: {flops['per_image']:.4g} FLOP per image, encoder {counted}")
    hashes = ", ".join(dict.fromkeys(row.settings_hash for row in rows)) if len(rows) <= 8 else "in the JSON file"
    return ["", *(f"{line}  " for line in lines), f"settings: {hashes}"]
