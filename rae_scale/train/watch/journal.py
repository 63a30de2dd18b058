"""`events.jsonl`: one line when an attempt begins, is ready, saves, rolls back and ends, with where its time went.

Every event has `event`, `attempt`, `time` (seconds since 1970), `step` (global steps done; null while unknown) and
`seconds` (what the time of this attempt went into until then). An attempt that was killed ends with the line `lost`,
which the next attempt makes of the main rank's last heartbeat.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rae_scale.train.watch.heartbeat import read_heartbeat

NAME = "events.jsonl"
Kind = Literal["begin", "ready", "save", "rollback", "end", "lost"]
Event = dict[str, Any]


def new_event(kind: Kind, attempt: int, step: int | None, seconds: Mapping[str, float], **details: Any) -> Event:
    """An event of this moment."""
    return {"event": kind, "attempt": attempt, "time": time.time(), "step": step, **details, "seconds": dict(seconds)}


def append_event(run_dir: Path, event: Event) -> None:
    with (run_dir / NAME).open("a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        torn = file.read() not in (b"", b"\n")  # by a kill, or by a disk that was full
        file.write(b"\n" * torn + json.dumps(event).encode() + b"\n")


def read_events(run_dir: Path) -> list[Event]:
    """All events that were written to their end, the oldest first."""
    path = run_dir / NAME
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:  # torn
            continue
    return events


def last_words(run_dir: Path, events: list[Event]) -> Event | None:
    """What the main rank's heartbeat tells of the last attempt beyond its events; None if that attempt has ended."""
    beat = read_heartbeat(run_dir, 0)
    if not events or beat is None or events[-1]["event"] in ("end", "lost"):
        return None
    if beat.attempt != events[-1]["attempt"] or beat.time <= events[-1]["time"]:
        return None
    return {**new_event("lost", beat.attempt, beat.step, beat.seconds), "time": beat.time}


def begin_attempt(run_dir: Path, **details: Any) -> list[Event]:
    """Write the beginning of the next attempt, and before it the end of the last one if a kill kept it from that.
    Returns all events; the last one has the attempt's number."""
    events = read_events(run_dir)
    new = [] if (lost := last_words(run_dir, events)) is None else [lost]
    new.append(new_event("begin", sum(event["event"] == "begin" for event in events) + 1, None, {}, **details))
    for event in new:
        append_event(run_dir, event)
    return events + new
