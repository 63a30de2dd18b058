"""Data that a run never trains on again: what it went through between a rollback's checkpoint and the rollback.

`skipped_data.json` in the run's folder lists the rollbacks, and nothing else decides: which global batch a step has
follows from the list and the step alone, and so does whether a checkpoint is of a branch that was given up. It is on
disk before anything is done about it, so a run that dies during a rollback finds it, and its restart completes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rae_scale.parallel import Mesh
from rae_scale.state.agreement import agree, on_main
from rae_scale.state.format import (
    CHECKPOINTS,
    MANIFEST,
    CheckpointError,
    point_to,
    read_json,
    remove_checkpoint,
    step_folders,
    step_of,
    sync_folder,
    write_json,
)
from rae_scale.state.load import read_state

FILE = "skipped_data.json"


@dataclass(frozen=True)
class Rollback:
    """After `from_step` steps the run went back to the checkpoint of `to_step`, and left out the global batches from
    number `first_batch` up to, not including, `end_batch`."""

    from_step: int
    to_step: int
    first_batch: int
    end_batch: int


@dataclass
class SkippedData:
    """The rollbacks of a run, oldest first."""

    rollbacks: list[Rollback] = field(default_factory=list)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """What is left out as [first, end) of global batch numbers: sorted, disjoint."""
        merged: list[tuple[int, int]] = []
        for first, end in sorted((entry.first_batch, entry.end_batch) for entry in self.rollbacks):
            if merged and first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((first, end))
        return merged

    def batch_of(self, step: int) -> int:
        """Number of the global batch that `step` (0 is the first) trains on: the step-th that is not left out."""
        batch = step
        for first, end in self.ranges:
            if batch >= first:
                batch += end - first
        return batch

    def leaves_out(self, batch: int) -> bool:
        return any(first <= batch < end for first, end in self.ranges)

    def abandons(self, step: int, rollbacks: int) -> bool:
        """Whether a checkpoint of `step`, made when there had been so many `rollbacks`, was gone behind by a later
        one: nothing may continue from it."""
        return any(step > entry.to_step for entry in self.rollbacks[rollbacks:])

    def write(self, folder: Path) -> None:
        """Replace the file in one piece and lastingly."""
        path = folder / FILE
        temporary = path.with_name(f".{FILE}.tmp")
        write_json(temporary, {"rollbacks": [asdict(entry) for entry in self.rollbacks]})
        os.replace(temporary, path)
        sync_folder(folder)


def read_skipped_data(folder: Path, mesh: Mesh) -> SkippedData:
    """What the run in `folder` leaves out. Collective; every rank gets what the main rank sees.

    Raises:
        CheckpointError: on all ranks. The file is there but not what `write` makes.
    """
    return agree(mesh, lambda: read_file(folder / FILE) if mesh.is_main else SkippedData())[0]


def read_file(path: Path) -> SkippedData:
    if not path.exists():
        return SkippedData()
    try:
        return SkippedData([Rollback(**entry) for entry in read_json(path)["rollbacks"]])
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{path} does not list rollbacks: the file is damaged. Without it, data that this run left out would be "
            "trained on; put back a copy, or choose another run.dir to start anew"
        ) from None


def drop_abandoned(folder: Path, skipped: SkippedData, mesh: Mesh) -> None:
    """Remove the checkpoints of branches that rollbacks gave up; `latest` names none of them. Collective."""
    if skipped.rollbacks:
        on_main(mesh, lambda: remove_checkpoints(folder / CHECKPOINTS, skipped.abandons))


def remove_checkpoints(root: Path, unwanted: Callable[[int, int], bool]) -> None:
    """unwanted: of a checkpoint's step and number of rollbacks."""
    removed: list[Path] = []
    kept: list[Path] = []
    for path in step_folders(root):
        if (path / MANIFEST).is_file():
            made_after = read_state(path).get("rollbacks", 0)
            (removed if unwanted(step_of(path) or 0, made_after) else kept).append(path)
    if removed and kept:
        point_to(kept[-1])
    for path in removed:
        remove_checkpoint(path)
