"""`rae-scale data stats`: how sizes, captions and formats are distributed, by corpus, and what was rejected and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from rae_scale.data.looking.examine import CountTokens, Examined, examine
from rae_scale.data.looking.open import LOOK, SmallFiles, is_shards, opened, shards_to_open
from rae_scale.data.looking.sampling import even_samples, even_shards, read_item
from rae_scale.data.looking.units import built_shards, samples_by_corpus, unit_counts
from rae_scale.data.looking.workers import in_processes
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.sources import Source

DEFAULT_COUNT = 10_000
# Indexes of a task for a worker; a shard of more is divided.
TASK_SAMPLES = 1000


@dataclass
class Stats:
    """What was found. `found` describes the samples examined; counts by unit, and of what was rejected, are complete.

    units:     samples by unit (the folder of one input file), in order; empty for a data set without units.
    by_corpus: the same, summed over the units whose names differ in numbers only.
    left_out:  what the manifests count as rejected or duplicate, by reason; empty without manifests.
    """

    path: str
    samples: int
    found: Examined
    units: dict[str, int] = field(default_factory=dict)
    by_corpus: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        found = self.found
        return {
            "path": self.path,
            "samples": self.samples,
            "examined": found.items,
            "distributions": {name: values.summary() for name, values in found.distributions.items()},
            "image_formats": dict(found.formats),
            "text_only": found.text_only,
            "conversations": found.conversations,
            "captions": found.captions,
            "cannot_be_used": dict(found.rejected),
            "samples_by_corpus": dict(self.by_corpus),
            "samples_by_unit": self.units,
            "left_out_when_built": dict(self.left_out),
        }


def stats(
    path: str | Path, *, count: int | None = DEFAULT_COUNT, tokenizer: str | None = None, workers: int = 1
) -> Stats:
    """Statistics of a folder of shards (or a URL of one), a tar or a JSON lines file; images by their headers.

    count:     how many samples are examined, evenly spaced; None is all. A remote data set is sampled from at most
               REMOTE_SHARDS shards, because each is fetched whole. A tar or JSON lines file is always read to its end.
    tokenizer: folder or hub name, to count the tokens of captions.
    workers:   processes, for a folder of shards.

    Raises ValueError or FileNotFoundError for what cannot be opened.
    """
    if not is_shards(path):
        found = examine(Source(Path(path)), tokens_by(tokenizer))
        return Stats(str(path), found.items, found)
    reader = MDSReader(path, LOOK)
    most = None if count is None else shards_to_open(path)
    chosen = even_samples(reader.sizes, count, even_shards(reader.sizes, most))
    found = Examined()
    for part in in_processes(partial(examine_samples, str(path), tokenizer), in_tasks(chosen), workers):
        found.merge(part)
    opened.cache_clear()
    files = SmallFiles(path)
    built = built_shards(files, reader.mds_index)
    units = {unit: int(reader.sizes[numbers].sum()) for unit, numbers in built.items()}
    return Stats(reader.source, len(reader), found, units, samples_by_corpus(units), left_out(files, units))


def left_out(files: SmallFiles, units: Iterable[str]) -> Counter[str]:
    """What the manifests count as rejected or duplicate, by reason."""
    counts = unit_counts(files, units).counts
    return counts.rejected + Counter(duplicate=counts.duplicates)


def in_tasks(chosen: Iterator[tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
    """Joins samples of neighbouring shards, and divides large shards, into tasks of about TASK_SAMPLES samples."""
    waiting: list[np.ndarray] = []
    for _, indexes in chosen:
        waiting.append(indexes)
        if sum(map(len, waiting)) >= TASK_SAMPLES:
            joined = np.concatenate(waiting)
            yield from np.array_split(joined, max(1, len(joined) // TASK_SAMPLES))
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def examine_samples(path: str, tokenizer: str | None, indexes: np.ndarray) -> Examined:
    reader = opened(path)
    return examine((read_item(reader, int(index)) for index in indexes), tokens_by(tokenizer))


@lru_cache(maxsize=1)
def tokens_by(tokenizer: str | None) -> CountTokens | None:
    """A function that counts the tokens of a text; the tokenizer is loaded once per process."""
    if tokenizer is None:
        return None
    from rae_scale.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return lambda text: len(loaded(text).input_ids)
