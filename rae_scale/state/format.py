"""What a checkpoint looks like on disk.

    <run>/checkpoints/
        latest                          text: the name of the newest complete checkpoint
        step-00001000/
            rank-00000.safetensors ...  the pieces that each rank owned, float32, keys "kind/name/start0,start1,..."
            index.json                  tensor -> shape, and per kind its pieces' boxes and files
            state.json                  step, optimizer step, mesh, versions, and what the caller added
            manifest.json               file -> xxh3-128
        damaged-step-00002000/          set aside by a resume that found a file changed; not touched again

Boxes are parts of the logical tensor, so nothing in here depends on how the writer had split it. There is no pickle. A
folder is complete if it has its manifest, which is written last; until then it has a hidden name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

FORMAT = "rae-scale checkpoint"
VERSION = 2
INDEX, STATE, MANIFEST, LATEST = "index.json", "state.json", "manifest.json", "latest"
EXPORTED, CONFIG = "model.safetensors", "config.yaml"
CHECKPOINTS = "checkpoints"
READ_BYTES = 1 << 22
STEP_FOLDER = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or cannot be loaded into this model. Says which file or tensor and why."""


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint's folder is named after; None if it has another name: a user's copy, say."""
    found = STEP_FOLDER.fullmatch(folder.name)
    return int(found[1]) if found else None


def step_folders(root: Path) -> list[Path]:
    """The folders in `root` that are named after a step, complete or not, in the order of their steps."""
    found = [(step, path) for path in root.glob("step-*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def temporary_folder(final: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return final.parent / f".{final.name}.tmp"


def replaced_folder(final: Path) -> Path:
    """Where a checkpoint waits while another takes its name."""
    return final.parent / f".{final.name}.old"


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: {path.parent} is not a complete checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): the file is damaged") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no JSON object but {type(content).__name__}: the file is damaged")
    return content


def write_json(path: Path, content: Mapping[str, Any], indent: int | None = 1) -> str:
    """Write, force to disk, and return the hash of what was written."""
    data = json.dumps(content, indent=indent).encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        sync(file.fileno())
    return xxhash.xxh3_128_hexdigest(data)


def sync(descriptor: int) -> None:
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Force the folder's list of names to disk: a rename lasts only then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def point_to(checkpoint: Path) -> None:
    """Let `latest` name this checkpoint, at once and lastingly."""
    root = checkpoint.parent
    pointer = root / f".{LATEST}.tmp"
    with pointer.open("w", encoding="utf-8") as file:
        file.write(checkpoint.name)
        file.flush()
        sync(file.fileno())
    os.replace(pointer, root / LATEST)
    sync_folder(root)


def remove_checkpoint(folder: Path) -> None:
    """First what makes it complete, so that half of it is never taken for a checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def file_hash(path: Path) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def damaged_files(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with every `parts`-th file of the manifest, from number `part` on: one line per file.

    safetensors reads a flipped byte without an error, hence the hashes.

    Raises:
        CheckpointError: the manifest is missing or no JSON.
    """
    problems = []
    for name, expected in sorted(read_json(folder / MANIFEST).items())[part::parts]:
        if not (folder / name).is_file():
            problems.append(f"{folder / name} is missing")
        elif file_hash(folder / name) != expected:
            problems.append(f"{folder / name} is damaged: its contents are not what was written")
    return problems
