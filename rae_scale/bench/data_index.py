"""What it costs to open a data set of a given size and to resume in it: an index of that size, without the images."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

SAMPLES = 73_000_000
SAMPLES_PER_SHARD = 802
"""91,000 shards of 64 MB: more and smaller ones than `data build` writes, and so the larger index."""
SHARD_BYTES = 2**26
SHARDS_PER_UNIT = 8
POSITIONS = 2048
RESUMES = 20


@dataclass(frozen=True)
class IndexCost:
    """Of one process, in seconds and in 1e6 bytes.

    open_s: to open the index. open_mb: by how much the process grew for it, peak_mb: at the most. imports_mb: what it
    had before. sent_mb: what a worker process is sent in place of opening it again. order_s: to make the data order.
    resume_s: the slowest of 20 resumptions at random positions of 100 epochs, each with the places of 2,048 samples.
    """

    samples: int
    shards: int
    index_mb: float
    open_s: float
    open_mb: float
    peak_mb: float
    imports_mb: float
    sent_mb: float
    order_s: float
    resume_s: float


def measure_index(samples: int = SAMPLES, samples_per_shard: int = SAMPLES_PER_SHARD, lanes: int = 8) -> IndexCost:
    """In a fresh process, so that its memory is that of the reader alone."""
    with tempfile.TemporaryDirectory(prefix="rae-scale-index-") as folder:
        write_index(Path(folder), samples, samples_per_shard)
        command = [sys.executable, "-m", "rae_scale.bench.data_index", folder, str(lanes)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the process that opens the index ended with {done.returncode}: {done.stderr[-500:]}")
    return IndexCost(**json.loads(done.stdout))


def write_index(folder: Path, samples: int, samples_per_shard: int) -> None:
    """An index as `data build` writes it. The shards are not there: opening does not look at them."""
    from rae_scale.data.mds_format import HASH, INDEX_NAME, WRITTEN

    form = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [HASH],
        "size_limit": SHARD_BYTES,
        "column_names": list(WRITTEN),
        "column_encodings": list(WRITTEN.values()),
        "column_sizes": [None] * len(WRITTEN),
        "zip_data": None,
    }
    shards = []
    for number, start in enumerate(range(0, samples, samples_per_shard)):
        unit, shard = divmod(number, SHARDS_PER_UNIT)
        name = f"{unit:05}-cc12m-train-{unit:04}/shard.{shard:05}.mds"
        raw = {"basename": name, "bytes": SHARD_BYTES - number % 1000, "hashes": {HASH: f"{number:032x}"}}
        shards.append({**form, "samples": min(samples_per_shard, samples - start), "raw_data": raw})
    (folder / INDEX_NAME).write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))


def measure_here(folder: Path, lanes: int) -> IndexCost:
    import pickle

    import numpy as np

    from rae_scale.data.mds_format import INDEX_NAME
    from rae_scale.data.mds_reader import MDSReader
    from rae_scale.data.mixture import Mixture

    imports = resident_mb()
    begin = time.perf_counter()
    reader = MDSReader(folder)
    opened = time.perf_counter() - begin
    grown = resident_mb() - imports
    peak = peak_mb() - imports
    begin = time.perf_counter()
    order = Mixture([reader.sizes], [1.0], 0, shuffle_block=65_536, lanes=lanes, global_batch_size=2048)
    order_s = time.perf_counter() - begin
    draw = random.Random(0)
    resumed = []
    for _ in range(RESUMES):
        position = draw.randrange(100 * len(reader))
        begin = time.perf_counter()
        order.locate_many(np.arange(position, position + POSITIONS))
        resumed.append(time.perf_counter() - begin)
    return IndexCost(
        samples=len(reader),
        shards=len(reader.sizes),
        index_mb=(folder / INDEX_NAME).stat().st_size / 1e6,
        open_s=opened,
        open_mb=grown,
        peak_mb=peak,
        imports_mb=imports,
        sent_mb=len(pickle.dumps(reader)) / 1e6,
        order_s=order_s,
        resume_s=max(resumed),
    )


def resident_mb() -> float:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def peak_mb() -> float:
    """Not getrusage's, which begins with what the parent process held when it forked."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    print(json.dumps(asdict(measure_here(Path(sys.argv[1]), int(sys.argv[2])))))
