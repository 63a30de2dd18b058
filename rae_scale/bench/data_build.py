"""`data build` with pass-through of the images, beside a plain read, hash and write of the same files."""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from rae_scale.bench.chart import bars
from rae_scale.bench.checkpoint import filesystem, forget
from rae_scale.bench.data_pictures import made_samples, repeated, write_tars
from rae_scale.bench.harness import Benchmark, Case, Measured, run_benchmark
from rae_scale.bench.record import Measure, Record
from rae_scale.bench.session import Session
from rae_scale.data.build import BuildOptions, build
from rae_scale.data.mds_writer import sync_folder
from rae_scale.data.prepare import PrepareOptions

BLOCK_BYTES = 2**20
DIFFERENT = 64
"""Pictures that are made; the tars hold them again and again, since making one takes longer than copying hundreds."""

COLUMNS = {
    "setting": "{name}",
    "GB": "{gigabytes:.2f}",
    "build MB/s": "{build_mb_s:.0f}",
    "images/s": "{images_per_s:.0f}",
    "build ms": "{build_ms:.0f}",
    "10 - 90 %": "{build_low_ms:.0f} - {build_high_ms:.0f}",
    "plain MB/s": "{plain_mb_s:.0f}",
    "plain ms": "{plain_ms:.0f}",
    "of plain": "{of_plain:.2f}",
}


@dataclass(frozen=True)
class Work:
    """What is built. files: tars. size: pixels of a side of the JPEGs. verify: as of `data build`."""

    images: int = 32_000
    size: int = 512
    files: int = 8
    workers: int = 1
    verify: Literal["decode", "header"] = "header"


def bench_data_build(
    work: Sequence[Work],
    session: Session,
    *,
    folder: Path,
    repeats: int = 5,
    after_row: Callable[[Record], None] = lambda record: None,
) -> Record:
    """A row for each `work`. folder: on the file system in question; what is written there is removed.

    Raises:
        ValueError: the folder is none.
    """
    if not folder.is_dir():
        raise ValueError(f"--folder={folder} is no folder; give one on the file system that data sets will be on")

    def case_of(one: Work) -> Case:
        settings: dict[str, Any] = {**vars(one), "filesystem": filesystem(folder)}
        run = functools.partial(measure, one, folder, repeats)
        return Case(settings, {}, run, varied={"workers": one.workers, "verify": one.verify})

    return run_benchmark(DATA_BUILD, [()], lambda point: [case_of(one) for one in work], session, after_row=after_row)


def measure(work: Work, folder: Path, repeats: int) -> Measured:
    """Both in turns, the other one first every time: the disk is faster at one moment than at the next."""
    seconds: dict[str, list[float]] = {"build": [], "plain": []}
    with tempfile.TemporaryDirectory(prefix="rae-scale-bench-", dir=folder) as made:
        scratch = Path(made)
        pictures = list(made_samples(min(work.images, DIFFERENT), work.size))
        tars = write_tars(scratch / "tars", repeated(pictures, work.images), work.files)
        total = sum(tar.stat().st_size for tar in tars)
        runs = {"build": functools.partial(run_build, work, tars), "plain": functools.partial(run_plain, work, tars)}
        for number in range(-1, repeats):
            for name in sorted(runs, reverse=number % 2 == 0):
                forget(scratch / "tars")
                started = time.perf_counter()
                runs[name](scratch / "out")
                taken = time.perf_counter() - started
                shutil.rmtree(scratch / "out")
                if number >= 0:  # the first turn warms up
                    seconds[name].append(taken)
    measures = {name: Measure.of(times) for name, times in seconds.items()}
    ratios = [plain / own for own, plain in zip(seconds["build"], seconds["plain"], strict=True)]
    values = {f"{name}_mb_s": total / 1e6 / measure.median for name, measure in measures.items()}
    values |= {"gigabytes": total / 1e9, "images_per_s": work.images / measures["build"].median}
    return Measured(measures, values | {"of_plain": statistics.median(ratios)})


def run_build(work: Work, tars: Sequence[Path], out: Path) -> None:
    options = BuildOptions(prepare=PrepareOptions(verify=work.verify))
    report = build(tars, out, options, workers=work.workers)
    if report.counts.kept != work.images:
        raise ValueError(f"{report.counts.kept} of {work.images} images were kept: not the work that was asked for")


def run_plain(work: Work, tars: Sequence[Path], out: Path) -> None:
    """Read, hash and write each file, then wait until it is on the disk. As many at a time as the build has workers, in
    threads, which start in no time; all of this goes on beside Python's lock."""
    out.mkdir()
    with ThreadPoolExecutor(work.workers) as threads:
        for _ in threads.map(lambda tar: copy_plainly(tar, out / tar.name), tars):
            pass
    sync_folder(out)


def copy_plainly(path: Path, copy: Path) -> None:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as source, open(copy, "wb", buffering=0) as target:
        while block := source.read(BLOCK_BYTES):
            digest.update(block)
            target.write(block)
        os.fsync(target.fileno())


def notes(record: Record) -> list[str]:
    return [
        "Plain: the same tars read in blocks of 1 MiB, hashed with XXH3, written to new files, fsync, by as many "
        "threads as the build has processes, whose start counts. Before each, the tars were dropped from the page "
        "cache. Of plain: plain's time over the build's, median over the turns. The build hashes its input and output, "
        "reads every image's header, and writes one shard while it fills the next."
    ]


DATA_BUILD = Benchmark("data-build", "Building data sets", COLUMNS, bars("build", "plain"), notes=notes)
