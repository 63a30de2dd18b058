"""Whether a run that has ended is to be started again, from its status.json and from how often it got no further.

`python -m rae_scale.launch.requeue --restarts 3 --status 1 -- train CONFIG ...` tells a batch script by its exit
status: 0 or the given one, or 75 to start the job again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from rae_scale.launch.subject import read_subject

# EX_TEMPFAIL of sysexits.h: try again.
REQUEUE = 75
FAILED = 1
STATUS, COUNT = "status.json", "restarts.json"


class Verdict(Enum):
    FINISHED = 0
    REQUEUE = REQUEUE  # Stopped as asked; everything is saved.
    RESTART = 2
    GIVE_UP = FAILED


@dataclass(frozen=True)
class Ended:
    """How an attempt ended, as the run's folder tells. `state` is "" where there is no status.json that can be read."""

    state: str
    step: int
    reason: str = ""
    attempt: int | None = None
    max_steps: int = 0

    def __str__(self) -> str:
        if not self.state:
            return "it ended before its first step"
        what = "killed" if self.state == "running" else self.state
        return f"{what} at step {self.step} of {self.max_steps}" + (f": {self.reason}" if self.reason else "")


def read_end(run_dir: Path) -> Ended:
    """Of the newest attempt. Other programs may have written the file: what is no status counts as none."""
    try:
        told = json.loads((run_dir / STATUS).read_text(encoding="utf-8"))
        return Ended(
            str(told["state"]), int(told["step"]), str(told["reason"]), int(told["attempt"]), int(told["max_steps"])
        )
    except (OSError, ValueError, TypeError, KeyError):
        return Ended("", 0)


@dataclass
class Restarts:
    """Counts failures in a row without a further step, in `restarts.json`, where the run's next job goes on counting.

    limit: so many may follow each other; a failure after a further step begins again at one.
    keeps_count: whether this is the one of the run's launches that writes the file; the others count for themselves.
    """

    run_dir: Path
    limit: int
    keeps_count: bool = True
    best: int = 0
    failures: int = 0

    def __post_init__(self) -> None:
        try:
            counted = json.loads((self.run_dir / COUNT).read_text(encoding="utf-8"))
            self.best, self.failures = int(counted["step"]), int(counted["failures"])
        except (OSError, ValueError, TypeError, KeyError):
            pass

    def judge(self, end: Ended) -> Verdict:
        """What follows after an attempt that ended so."""
        if end.state in ("finished", "requeue"):
            self._count(end.step, 0)
            return Verdict.FINISHED if end.state == "finished" else Verdict.REQUEUE
        self._count(end.step, 1 if end.step > self.best else self.failures + 1)
        return Verdict.RESTART if self.failures <= self.limit else Verdict.GIVE_UP

    def _count(self, step: int, failures: int) -> None:
        self.best, self.failures = max(step, self.best), failures
        if self.keeps_count:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            temporary = self.run_dir / f".{COUNT}.{os.getpid()}.tmp"
            temporary.write_text(json.dumps({"step": self.best, "failures": failures}) + "\n", encoding="utf-8")
            temporary.replace(self.run_dir / COUNT)


def main() -> int:
    parser = argparse.ArgumentParser(description="Exit with 75 if the run is to be started again.")
    parser.add_argument("--restarts", type=int, required=True, help="failures in a row without a further step")
    parser.add_argument("--status", type=int, required=True, help="exit status of what has ended")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    subject = read_subject([word for word in arguments.command if word != "--"])
    if subject.config is None:
        return int(arguments.status)
    return after(arguments.status, subject.folder, arguments.restarts)


def after(status: int, run_dir: Path, limit: int) -> int:
    """The exit status of a job whose nodes' launches ended with `status` (the highest of theirs)."""
    restarts, end = Restarts(run_dir, limit), read_end(run_dir)
    if status not in (0, REQUEUE) and end.state in ("finished", "requeue"):
        end = Ended("", end.step)  # Of an earlier job: this one did not come so far as to say anything.
    print(f"{run_dir}: {end}", file=sys.stderr)
    if status in (0, REQUEUE):
        # The nodes have judged; no failure is left to count.
        restarts.judge(replace(end, state="requeue"))
        return status
    if restarts.judge(end) is Verdict.GIVE_UP:
        print(f"failure {restarts.failures} in a row without a further step: given up", file=sys.stderr)
        return status
    return REQUEUE


if __name__ == "__main__":
    sys.exit(main())
