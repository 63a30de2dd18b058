"""The folder of a build: what is in it, who may write to it, and how a part of it comes into being.

build.json                        options and inputs, recorded by the first builder
<unit>/shard.00000.mds, ...       one folder per input file; appears when it is complete
<unit>/manifest.json              what it was made from, what became of the samples
<unit>/rejected.jsonl             every sample that was left out, and why
fingerprints/                     with a search for duplicates: see `rae_scale.data.build.duplicates`
rejected.jsonl                    of all units, written by the merge
index.json                        written last by the merge: with it, the folder is a data set
.lock, .partial/                  of builders at work
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rae_scale.data.build.locks import Held, lock
from rae_scale.data.build.options import differences, hash_of
from rae_scale.data.build.units import Unit
from rae_scale.data.mds_format import INDEX_NAME
from rae_scale.data.mds_writer import sync_folder, write_durably

T = TypeVar("T")

RECORD_NAME = "build.json"
LOCK_NAME = ".lock"
PARTIAL_NAME = ".partial"
VERSION = 1
# A killed builder's workers end within moments, but after a long fsync; other builders' units are refused after this.
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Record:
    """`build.json`. options: one level deep. inputs: file names, in order; their folders may move."""

    options: dict[str, Any]
    inputs: list[str]

    @property
    def hash(self) -> str:
        """Of the options."""
        return hash_of(self.options)


@dataclass(frozen=True)
class BuildFolder:
    path: Path

    @contextmanager
    def builder(self, *, alone: bool) -> Iterator[None]:
        """Be a builder of this folder: `alone`, or beside others that write other units.

        Raises ValueError when another builder is at work that does not allow it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with lock(self.path / LOCK_NAME, shared=not alone):
                yield
        except Held:
            raise ValueError(
                f"{self.path}: another build is writing it now; wait for it or choose another folder (builders that "
                "share one folder all need --units)"
            ) from None

    def check_free(self) -> None:
        """Raises ValueError when the folder has content that is not of a build."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: is a file; choose another folder")
        if not self.path.exists() or (self.path / RECORD_NAME).exists():
            return
        if any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise ValueError(
                f"{self.path}: exists, is not empty and has no {RECORD_NAME}; choose another folder or remove it first"
            )

    def record(self, options: dict[str, Any], units: Sequence[Unit]) -> Record:
        """Write `build.json`, or compare with the one that is there. More inputs at the end are recorded.

        Raises ValueError, naming the differences, for other options or inputs.
        """
        asked = Record(options, [unit.path.name for unit in units])
        if (self.path / RECORD_NAME).exists():
            found = self.read_record()
            if changed := differences(found.options, options):
                raise ValueError(
                    f"{self.path}: was begun with other options ({'; '.join(changed)}); use the same ones, or choose "
                    "another folder"
                )
            check_inputs(self.path, found.inputs, asked.inputs)
            if found == asked:
                return asked
        fields = {"version": VERSION, "options": asked.options, "inputs": asked.inputs}
        content = json.dumps(fields, sort_keys=True, indent=1).encode("ascii") + b"\n"
        write_durably(self.path / RECORD_NAME, [content])
        return asked

    def read_record(self) -> Record:
        path = self.path / RECORD_NAME
        try:
            fields = json.loads(path.read_bytes())
            if fields["version"] != VERSION:
                raise ValueError(f"{path}: version {fields['version']}, this program writes {VERSION}; build anew")
            return Record(fields["options"], fields["inputs"])
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{path}: no such file; give the folder that `rae-scale data build` writes to") from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not what a build records ({error!r}); remove the folder, build again") from None

    def make(
        self,
        name: str,
        current: Callable[[], T | None],
        write: Callable[[Path], T],
        *,
        patience_s: float = PATIENCE_S,
    ) -> tuple[T, bool]:
        """The part `name` of the folder (a folder itself), written unless what is there is `current`.

        write:   fills an empty folder, every file synced; the part appears under its name when all is there. Whatever
                 ends the process before leaves the part as it was, or absent.
        current: what `write` returned for the part that is there; None when it is to be written.

        Returns what `write` or `current` did, and whether it was written. Raises ValueError when another process is
        writing the same part and does not end.
        """
        found = current()
        if found is not None:
            return found, False
        partial = self.path / PARTIAL_NAME / name.replace("/", "-")
        partial.parent.mkdir(exist_ok=True)
        try:
            with lock(partial.with_name(f"{partial.name}.lock"), patience_s=patience_s):
                found = current()  # by whoever held the lock before
                if found is not None:
                    return found, False
                if (self.path / name).exists():
                    # An index would then be of shards that are no longer there.
                    (self.path / INDEX_NAME).unlink(missing_ok=True)
                return replace_folder(self.path / name, partial, write), True
        except Held:
            raise ValueError(
                f"{self.path / name}: another builder is writing it now; give every builder units of its own (--units)"
            ) from None

    def remove_partial(self) -> None:
        """Only while no other builder is at work."""
        shutil.rmtree(self.path / PARTIAL_NAME, ignore_errors=True)


def check_inputs(path: Path, recorded: Sequence[str], asked: Sequence[str]) -> None:
    for number, (there, now) in enumerate(zip(recorded, asked, strict=False)):
        if there != now:
            raise ValueError(
                f"{path}: was begun with other inputs (number {number}: {there} there, {now} now); give the same ones "
                "in the same order, new ones last, or choose another folder"
            )
    if len(asked) < len(recorded):
        raise ValueError(
            f"{path}: was begun with {len(recorded)} inputs, {len(asked)} are given now ({recorded[len(asked)]} is the "
            "first that is missing); give all of them, with --units i/N to build a part"
        )


def replace_folder(target: Path, partial: Path, write: Callable[[Path], T]) -> T:
    remove(partial)
    if target.exists():
        os.rename(target, partial)  # at once, so that half of it is never taken for the whole
        remove(partial)
    partial.mkdir()
    try:
        written = write(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # the error that led here matters more
        raise
    sync_folder(partial)
    target.parent.mkdir(exist_ok=True)
    os.rename(partial, target)
    sync_folder(target.parent)
    return written


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
