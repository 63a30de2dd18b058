"""The units of a build: one input file each, in the order in which the inputs were given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_STEM_LENGTH = 100
MAX_UNITS = 100_000  # five digits


@dataclass(frozen=True)
class Unit:
    """One input file. `name` is that of its folder in the output: `00012-cc12m-0012`."""

    number: int
    name: str
    path: Path


@dataclass(frozen=True)
class Part:
    """The share of one of several builders: every `count`-th unit from the `index`-th on, counted from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str, option: str = "--units") -> Part:
        """`i/N`, as in `--units $SLURM_ARRAY_TASK_ID/100`. Raises ValueError, naming the `option`."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ValueError(f"{option} {text!r}: write it as i/N, for example 0/8 to 7/8 for eight jobs")
        index, count = map(int, match.groups())
        if index >= count:
            raise ValueError(f"{option} {text}: parts are counted from 0, so {count} jobs have 0/{count} to "
                             f"{count - 1}/{count}")  # fmt: skip
        return cls(index, count)

    def of(self, units: Sequence[Unit]) -> list[Unit]:
        return list(units[self.index :: self.count])


def units_of(paths: Sequence[str | Path]) -> list[Unit]:
    if not paths:
        raise ValueError("no inputs: give at least one .tar or .jsonl file")
    if len(paths) > MAX_UNITS:
        raise ValueError(f"{len(paths)} inputs; a build has at most {MAX_UNITS}: join small ones, or build two folders")
    return [Unit(number, unit_name(number, Path(path)), Path(path).absolute()) for number, path in enumerate(paths)]


def unit_name(number: int, path: Path) -> str:
    """Position and stem; what could mean something to a shell or a file system becomes `_`."""
    stem = re.sub(r"(\.\w+){1,2}$", "", path.name)
    return f"{number:05}-{re.sub(r'[^A-Za-z0-9._-]', '_', stem)[:MAX_STEM_LENGTH]}"
