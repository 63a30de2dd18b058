"""Small files of a run's folder that other processes read while they are written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def rank_name(rank: int) -> str:
    """`rank-00003`: sorts by number for every size of a run."""
    return f"rank-{rank:05d}"


def replace_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` so that a reader finds the old file or the new one, never a part of either."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """None if there is no such file, or none that holds an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None
