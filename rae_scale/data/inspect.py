"""`rae-scale data inspect`: what is in a tar, a JSON lines file or a folder of MDS shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rae_scale.data.decode import DEFAULT_MAX_PIXELS, read_header
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.record import BadSample, Sample
from rae_scale.data.sources import Item, Source

# An MDS folder can hold millions of samples; statistics come from this many, evenly spaced.
MAX_EXAMINED = 10_000
PREVIEWS = 5


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of some numbers."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: list[int]) -> Spread | None:
        return cls(min(values), median(values), max(values)) if values else None


@dataclass(frozen=True)
class Preview:
    key: str
    text: str
    image: str


@dataclass
class InspectReport:
    """What was found. Statistics describe the `examined` of all `samples`; bad ones are counted, by reason."""

    path: Path
    kind: str
    samples: int
    examined: int = 0
    bytes: int = 0
    shards: int = 0
    layouts: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    damage: str | None = None
    image_formats: Counter[str] = field(default_factory=Counter)
    text_only: int = 0
    conversations: int = 0
    captions: int = 0
    caption_length: Spread | None = None
    width: Spread | None = None
    height: Spread | None = None
    image_bytes: Spread | None = None
    previews: list[Preview] = field(default_factory=list)


def inspect(path: str | Path) -> InspectReport:
    """Look into a `.tar`, a `.jsonl` or an MDS folder. Images are measured by their headers, not decoded.

    Raises ValueError or FileNotFoundError when `path` is none of these or an MDS folder is not intact.
    """
    path = Path(path)
    if path.is_dir():
        reader = MDSReader(path)
        report = InspectReport(path, "mds", samples=len(reader), shards=len(reader.shards))
        report.bytes = sum(shard.bytes for shard in reader.shards)
        examine(mds_items(reader), report)
        return report
    source = Source(path)
    report = InspectReport(path, path.suffix.lower().lstrip("."), samples=0, bytes=path.stat().st_size)
    examine(source, report)
    report.samples = report.examined
    report.damage = source.damage
    return report


def mds_items(reader: MDSReader) -> Iterator[Item]:
    count = min(len(reader), MAX_EXAMINED)
    for number in range(count):
        index = number * len(reader) // count
        try:
            sample = reader[index]
            yield Item(sample.key, sample, "conversations" if sample.turns else "captions")
        except BadSample as problem:
            yield Item(str(index), problem=problem)


def examine(items: Iterable[Item], report: InspectReport) -> None:
    lengths: list[int] = []
    widths: list[int] = []
    heights: list[int] = []
    sizes: list[int] = []
    for item in items:
        report.examined += 1
        sample = item.sample
        if sample is None:
            assert item.problem is not None
            report.rejected[item.problem.reason] += 1
            continue
        image = "none"
        if sample.image is None:
            report.text_only += 1
        else:
            try:
                header = read_header(sample.image, DEFAULT_MAX_PIXELS)
            except BadSample as problem:
                report.rejected[problem.reason] += 1
                continue
            report.image_formats[header.format] += 1
            widths.append(header.width)
            heights.append(header.height)
            sizes.append(len(sample.image))
            image = f"{header.format} {header.width} x {header.height}"
        report.layouts[item.layout] += 1
        report.conversations += bool(sample.turns)
        report.captions += len(sample.captions)
        lengths += [len(caption) for caption in sample.captions]
        if len(report.previews) < PREVIEWS:
            report.previews.append(Preview(sample.key, preview_text(sample), image))
    report.caption_length = Spread.of(lengths)
    report.width, report.height, report.image_bytes = Spread.of(widths), Spread.of(heights), Spread.of(sizes)


def preview_text(sample: Sample) -> str:
    if sample.turns:
        return " | ".join(f"{turn.role}: {turn.value}" for turn in sample.turns)
    return sample.captions[0] if sample.captions else ""
