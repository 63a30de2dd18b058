"""`rae-scale data build`: tars and JSON lines to a folder of MDS shards."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rae_scale.data.decode import DEFAULT_MAX_PIXELS, decode_image, read_header
from rae_scale.data.mds_writer import DEFAULT_SHARD_BYTES, MDSWriter, sync_folder, write_durably
from rae_scale.data.record import BadSample, Sample
from rae_scale.data.sources import Source

REJECTED_NAME = "rejected.jsonl"


@dataclass
class BuildReport:
    """What became of the samples: `read == written + sum(rejected.values())`.

    rejected: how many for each reason; `rejected.jsonl` beside the shards lists every one.
    damaged:  inputs that could not be read to their end, and why; how many samples they lost is unknown.
    """

    out_dir: Path
    written: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    damaged: dict[str, str] = field(default_factory=dict)
    shards: int = 0
    bytes: int = 0

    @property
    def read(self) -> int:
        return self.written + self.rejected.total()


def build(
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    verify: Literal["decode", "header"] = "decode",
) -> BuildReport:
    """Write the samples of `inputs` (tar or JSON lines files) as MDS shards into the new folder `out_dir`.

    Image bytes pass through unchanged. What cannot be used is left out and listed in `rejected.jsonl` with its reason:
    every image is decoded once to see (`verify="header"` only reads its size, about ten times as fast).

    The folder appears under its name when it is complete. A build that is killed leaves `<out_dir>.partial` behind,
    which the next build of the same folder starts over.

    Raises ValueError or FileNotFoundError, before anything is written, for an input that is missing or of an unknown
    kind, an `out_dir` that is not empty, or another build of the same folder still running.
    """
    if verify not in ("decode", "header"):
        raise ValueError(f"verify={verify!r}: choose decode or header")
    if not inputs:
        raise ValueError("no inputs: give at least one .tar or .jsonl file")
    sources = [Source(path) for path in inputs]
    out_dir = Path(out_dir)
    with partial_folder(out_dir) as folder:
        report = BuildReport(out_dir)
        writer = MDSWriter(folder, shard_bytes)
        lines = (line for source in sources for line in build_source(source, writer, report, max_pixels, verify))
        write_durably(folder / REJECTED_NAME, (json.dumps(line).encode("ascii") + b"\n" for line in lines))
        writer.finish()
        report.shards = len(writer.shards)
        report.bytes = sum(shard["raw_data"]["bytes"] for shard in writer.shards)
    return report


def build_source(
    source: Source, writer: MDSWriter, report: BuildReport, max_pixels: int, verify: str
) -> Iterator[dict[str, str]]:
    """Write one input's samples; yields a line for each that is rejected, and one for damage to the input itself."""
    for item in source:
        problem = item.problem
        if item.sample is not None:
            problem = image_problem(item.sample, max_pixels, verify)
        if item.sample is not None and problem is None:
            writer.write(item.sample)
            report.written += 1
        elif problem is not None:
            report.rejected[problem.reason] += 1
            yield {"source": str(source.path), "key": item.key, "reason": problem.reason, "detail": problem.detail}
    if source.damage:
        report.damaged[str(source.path)] = source.damage
        yield {"source": str(source.path), "key": "", "reason": "damaged input", "detail": source.damage}


def image_problem(sample: Sample, max_pixels: int, verify: str) -> BadSample | None:
    if sample.image is None:
        return None
    check = decode_image if verify == "decode" else read_header
    try:
        check(sample.image, max_pixels)
    except BadSample as problem:
        return problem
    return None


@contextmanager
def partial_folder(out_dir: Path) -> Iterator[Path]:
    """An empty folder that becomes `out_dir` when the block ends without an error."""
    out_dir = out_dir.absolute()
    partial = out_dir.with_name(out_dir.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it when this process dies
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"{out_dir}: another build is writing it now; wait for it or choose another folder") from None
    try:
        if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise ValueError(f"{out_dir}: exists and is not empty; choose another folder or remove it first")
        clear(partial)
        yield partial
        os.replace(partial, out_dir)
        sync_folder(out_dir.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # the error that led here matters more
        raise
    finally:
        os.close(lock)


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
