"""Where numbers come from, and how they are written down: JSON as they come in, and markdown tables."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Row = Mapping[str, Any]

PACKAGES = ("triton", "transformers", "deepspeed", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """GPU, versions and commit."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": os.environ.get("RAE_KERNELS", "auto"),
        "commit": commit(),
        **{name: version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the checkout that this file is in, with a mark if files were changed; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


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
