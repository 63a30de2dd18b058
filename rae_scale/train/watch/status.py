"""`status.json`: what a run is doing and how it ended, for whoever restarts it.

Exit codes cannot tell: torchrun exits with 1 after a stop that saved everything, and a node that is lost has none.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rae_scale.train.watch.files import read_json, replace_json
from rae_scale.train.watch.flags import Flags

State = Literal["running", "requeue", "finished", "failed"]
"""requeue: stopped by a signal, everything is saved, the same command goes on. failed: see `reason`. `running` without
a process: killed."""

LONGEST_REASON = 2000
NAME = "status.json"


@dataclass(frozen=True)
class Status:
    """Writes it. The main rank says that the run is running; the first rank that knows how it ended says that."""

    run_dir: Path
    flags: Flags
    world_size: int
    max_steps: int

    def running(self, step: int) -> None:
        """step: global steps done when this attempt began."""
        self._write("running", step, "")

    def end(self, state: State, step: int, reason: str = "") -> bool:
        """Whether this rank was the first to say how the attempt ended; what later ones say does not count: their
        errors are consequences."""
        if not self.flags.first("ended"):
            return False
        self._write(state, step, reason)
        return True

    def _write(self, state: State, step: int, reason: str) -> None:
        replace_json(
            self.run_dir / NAME,
            {
                "state": state,
                "step": step,
                "max_steps": self.max_steps,
                "reason": reason[:LONGEST_REASON],
                "world_size": self.world_size,
                "attempt": self.flags.attempt,
                "time": time.time(),
            },
        )


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """None before a run's first attempt."""
    return read_json(run_dir / NAME)
