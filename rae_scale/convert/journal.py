"""The journal of a folder that is being written: what of it is on disk, a JSON object a line."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rae_scale.state.format import CheckpointError, sync


@dataclass(frozen=True)
class Stretch:
    """Bytes of a file that are on disk. Up to there: digest, the hash of the file; casts, `CastErrors.to_json`."""

    start: int
    stop: int
    digest: str
    casts: dict[str, Any]


@dataclass
class FileRecord:
    """What is known of a file. done: its hash once it is complete; casts: `CastErrors.to_json` then."""

    stretches: list[Stretch] = field(default_factory=list)
    done: str | None = None
    casts: dict[str, Any] | None = None

    @property
    def held(self) -> int:
        """How many bytes from its beginning are on disk."""
        return self.stretches[-1].stop if self.stretches else 0


class Journal:
    """Appends lines that stay. Its first line is the purpose of the writing.

    Raises:
        CheckpointError: another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise CheckpointError(f"another process is writing there ({path} is locked); wait for it") from None
        except OSError:
            pass  # a file system without locks
        self.entries = self.read()

    def read(self) -> list[dict[str, Any]]:
        """Its lines; one that was cut off by the end of the process is removed from the file."""
        self.file.seek(0)
        entries, good = [], 0
        for line in self.file:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                break
            entries.append(entry)
            good += len(line)
        self.file.truncate(good)
        return entries

    @property
    def purpose(self) -> dict[str, Any] | None:
        """That of an earlier attempt; None if there was none."""
        return self.entries[0].get("purpose") if self.entries else None

    def records(self) -> dict[str, FileRecord]:
        """What an earlier attempt left, by the file's path in the folder."""
        return records_of(self.entries[1:])

    def begin(self, purpose: Mapping[str, Any]) -> None:
        self.file.truncate(0)
        self.note({"purpose": purpose})

    def note(self, entry: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(entry).encode() + b"\n")
        self.file.flush()
        sync(self.file.fileno())

    def note_stretch(self, name: str, stretch: Stretch) -> None:
        self.note({"file": name, "stretch": [stretch.start, stretch.stop, stretch.digest], "casts": stretch.casts})

    def note_done(self, name: str, digest: str, casts: dict[str, Any]) -> None:
        self.note({"file": name, "done": digest, "casts": casts})

    def close(self) -> None:
        self.file.close()


def records_of(entries: Iterable[Mapping[str, Any]]) -> dict[str, FileRecord]:
    files: dict[str, FileRecord] = {}
    for entry in entries:
        record = files.setdefault(entry["file"], FileRecord())
        if "done" in entry:
            record.done, record.casts = entry["done"], entry["casts"]
            continue
        start, stop, digest = entry["stretch"]
        # One attempt may have begun before where another, whose bytes were not as noted, had ended.
        record.stretches = [earlier for earlier in record.stretches if earlier.stop <= start]
        record.stretches.append(Stretch(start, stop, digest, entry["casts"]))
    return files
