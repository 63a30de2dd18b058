"""Which checkpoint a run continues from: the newest whose files are what was written."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path

from rae_scale.parallel import Mesh
from rae_scale.state.agreement import agree, on_main
from rae_scale.state.format import CHECKPOINTS, CheckpointError, damaged_files, point_to, sync_folder
from rae_scale.state.load import candidates

logger = logging.getLogger(__name__)
DAMAGED = "damaged-"


def intact_checkpoint(run_dir: str | Path, mesh: Mesh, up_to: int | None = None) -> Path | None:
    """The best checkpoint of a run whose every file has its hash; None if the run has none at all. Collective, and the
    same on all ranks, which share the reading.

    Each damaged one before it is named in a warning and set aside under a name that starts with "damaged-", so that
    neither this nor a later start takes it for a checkpoint.

    up_to: those of later steps are not looked at; None also if all that are are damaged. What is found becomes what
           `latest` names.

    Raises:
        CheckpointError: on all ranks. There are checkpoints, but each is damaged; or the disk cannot be read, which
            says nothing about what is on it.
    """
    root = Path(run_dir) / CHECKPOINTS
    (found, earlier), *_ = agree(
        mesh, lambda: (candidates(Path(run_dir), up_to), sorted(root.glob(f"{DAMAGED}*"))) if mesh.is_main else ([], [])
    )
    faults = [f"{path} was set aside as damaged earlier" for path in earlier]
    for folder in found:
        shares = agree(mesh, lambda folder=folder: damage(folder, mesh.rank, mesh.world_size))  # type: ignore[misc]
        problems = list(dict.fromkeys(itertools.chain.from_iterable(shares)))
        if not problems:
            on_main(mesh, lambda folder=folder: adopt(folder))  # type: ignore[misc]
            return final_name(folder)
        fault = "; ".join(problems)
        names = agree(mesh, lambda folder=folder, fault=fault: set_aside(folder, fault) if mesh.is_main else "")  # type: ignore[misc]
        faults.append(f"{fault} (set aside as {names[0]})")
    if faults and up_to is None:
        raise CheckpointError(
            f"no checkpoint in {root} can be continued:\n  " + "\n  ".join(faults) + "\n"
            "Put back an intact copy under the name step-..., or choose another run.dir to start anew"
        )
    return None


def damage(folder: Path, part: int, parts: int) -> list[str]:
    """What is wrong with this rank's share of the files. A manifest that cannot be used is wrong on every rank.

    Raises:
        CheckpointError: the folder is not there for this rank, so it cannot tell.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is there for the main rank but not visible here; put run.dir on a file system that all nodes "
            "share"
        )
    try:
        return damaged_files(folder, part, parts)
    except CheckpointError as error:
        return [str(error)]


def final_name(folder: Path) -> Path:
    """A checkpoint's own name, also while another was taking it."""
    return folder.with_name(folder.name.removeprefix(".").removesuffix(".old"))


def adopt(folder: Path) -> None:
    """Make an intact checkpoint the one that the next save and `latest` count from."""
    final = final_name(folder)
    if folder != final:
        os.rename(folder, final)
    point_to(final)


def set_aside(folder: Path, fault: str) -> str:
    """Rename a damaged checkpoint and return the name; a number is added if another of its step has that already."""
    base = DAMAGED + final_name(folder).name
    names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    logger.warning("%s; set aside as %s, looking for an older checkpoint", fault, aside.name)
    os.rename(folder, aside)
    sync_folder(folder.parent)
    return aside.name
