"""`flags/`: what a rank tells all others when it cannot communicate with them: stop, stalled, failed.

A flag is a file named `<attempt>-<flag>-<rank>`. Every rank looks into the folder every second or two.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

FOLDER = "flags"
Flag = Literal["stop", "stalled", "failed"]


@dataclass(frozen=True)
class Flags:
    run_dir: Path
    attempt: int
    rank: int

    def raise_flag(self, flag: Flag) -> None:
        """Once is enough."""
        write_new(self._path(f"{flag}-{self.rank}"))

    def raised(self) -> dict[Flag, list[int]]:
        """The ranks that raised each flag in this attempt."""
        found: dict[Flag, list[int]] = {flag: [] for flag in get_args(Flag)}
        # A listing, not a question for single names: network file systems remember for long what did not exist.
        for name in os.listdir(self.run_dir / FOLDER):
            for flag, ranks in found.items():
                start = f"{self.attempt}-{flag}-"
                if name.startswith(start):
                    ranks.append(int(name.removeprefix(start)))
        return found

    def first(self, what: str) -> bool:
        """Whether this rank is the first of all to ask so for `what`: the one that acts for everybody."""
        return write_new(self._path(what))

    def exists(self, what: str) -> bool:
        """Whether some rank was the first to ask for `what`."""
        return f"{self.attempt}-{what}" in os.listdir(self.run_dir / FOLDER)

    def _path(self, name: str) -> Path:
        return self.run_dir / FOLDER / f"{self.attempt}-{name}"


def write_new(path: Path) -> bool:
    """False if the file is there already."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def clear_flags(run_dir: Path) -> None:
    """Begin without those of earlier attempts."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink(missing_ok=True)
