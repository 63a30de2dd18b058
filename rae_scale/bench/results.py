"""How numbers are written down: JSON as they come in, and markdown tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all: a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def write(folder: Path, name: str, data: Mapping[str, Any], text: str) -> None:
    """`data` as NAME.json and `text` as NAME.md."""
    write_json(folder / f"{name}.json", data)
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A markdown table. columns: heading -> format of the row's entry, as in "{milliseconds:.2f}"; what a row lacks
    stays empty."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(
        [*lines, *("| " + " | ".join(cell(row, text) for text in columns.values()) + " |" for row in rows)]
    )


def cell(row: Row, text: str) -> str:
    try:
        return text.format_map(row)
    except (KeyError, TypeError, ValueError):
        return ""


def heading(title: str, found: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Title, environment and settings, as markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"## {title}\n\n{facts}\n\n{chosen}\n"
