"""What `rae-scale report` says of a run: its state, its attempts, and where its wall time went."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from rae_scale.train.watch.accounts import CAUSES, account
from rae_scale.train.watch.journal import NAME, last_words, read_events
from rae_scale.train.watch.status import read_status


def report(run_dir: str | Path) -> dict[str, Any]:
    """status: of `status.json`. attempts, steps: counts. wall_s, productive_s: seconds. effective_time: the second over
    the first. lost_s: seconds by cause (`accounts.CAUSES`), which with `productive_s` add up to `wall_s`.

    Raises:
        ValueError: `run_dir` is no run's folder.
    """
    folder = Path(run_dir)
    events = read_events(folder)
    if not events:
        raise ValueError(f"{folder} holds no {NAME}: no training has begun there; give the run.dir of a run")
    if (last := last_words(folder, events)) is not None:
        events.append(last)
    accounts = account(events)
    return {
        "status": read_status(folder),
        "attempts": accounts.attempts,
        "steps": accounts.steps,
        "wall_s": accounts.wall_s,
        "productive_s": accounts.productive_s,
        "effective_time": accounts.effective,
        "lost_s": accounts.lost,
    }


def describe(values: dict[str, Any]) -> str:
    """`report` for people: a line on the state and a table."""
    status = values["status"] or {}
    reason = f": {status['reason']}" if status.get("reason") else ""
    of = f" of {status['max_steps']:,}" if status else ""
    rows = [("productive", values["productive_s"]), *((CAUSES[key], s) for key, s in values["lost_s"].items())]
    wall = values["wall_s"]
    lines = [
        f"{status.get('state', 'unknown')}{reason}",
        f"step {values['steps']:,}{of}, {values['attempts']} attempt(s), effective training time "
        f"{values['effective_time']:.1%}",
        "",
    ]
    lines += [f"{name:<26}{clock(seconds):>16}{share(seconds, wall):>8}" for name, seconds in [*rows, ("wall", wall)]]
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """`2 days, 3:04:05`, to the tenth of a second below a minute."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def share(seconds: float, wall: float) -> str:
    return f"{seconds / wall:.1%}" if wall > 0 else ""
