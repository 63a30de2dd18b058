"""`heartbeats/rank-00003.json`: who a rank is and where it stands, replaced every few seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rae_scale.train.watch.files import rank_name, read_json, replace_json

FOLDER = "heartbeats"


@dataclass(frozen=True)
class Heartbeat:
    """time, since: when it was written and when `phase` was entered, seconds since 1970 by the clock of `host`.
    time_out: seconds that the phase may last. seconds: what the time of this attempt went into so far.
    where: `file:line function` of the training thread, known once the run is stuck. waiting: it waits for other ranks.
    """

    rank: int
    host: str
    pid: int
    attempt: int
    step: int
    phase: str
    since: float
    time_out: float
    time: float
    seconds: Mapping[str, float]
    where: str | None = None
    waiting: bool = False


def write_heartbeat(run_dir: Path, beat: Heartbeat) -> None:
    replace_json(heartbeat_path(run_dir, beat.rank), asdict(beat))


def read_heartbeat(run_dir: Path, rank: int) -> Heartbeat | None:
    """The newest one of a rank, of whichever attempt; None if there is none that can be read."""
    values: dict[str, Any] | None = read_json(heartbeat_path(run_dir, rank))
    names = {field.name for field in fields(Heartbeat)}
    return Heartbeat(**values) if values is not None and values.keys() == names else None


def read_heartbeats(run_dir: Path, ranks: Iterable[int], attempt: int) -> dict[int, Heartbeat]:
    """Those of this attempt, by rank."""
    beats = {rank: read_heartbeat(run_dir, rank) for rank in ranks}
    return {rank: beat for rank, beat in beats.items() if beat is not None and beat.attempt == attempt}


def remove_heartbeats(run_dir: Path) -> None:
    """What earlier attempts left, perhaps with more ranks."""
    for path in (run_dir / FOLDER).glob("*rank-*"):
        path.unlink(missing_ok=True)


def heartbeat_path(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"{rank_name(rank)}.json"
