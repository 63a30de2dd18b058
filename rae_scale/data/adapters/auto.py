"""The adapter that sees the layout of each sample from its members."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rae_scale.data.adapters.base import Damage, Item, TarAdapter
from rae_scale.data.json_lines import read_image_file, read_lines, record_key
from rae_scale.data.layouts import captions_from_json, claimed_images, make_sample, sample_from_group
from rae_scale.data.record import BadSample, Sample
from rae_scale.data.tars import TAR_SUFFIXES, Group, TarReader
from rae_scale.data.text import parse_json_object


@dataclass(frozen=True)
class Auto(TarAdapter):
    """Tars and JSON lines in any of the layouts of `rae_scale.data.layouts`.

    Several captions are kept without weights; the adapter of a corpus knows more about them.
    """

    name: ClassVar[str] = "auto"
    suffixes: ClassVar[tuple[str, ...]] = (*TAR_SUFFIXES, ".jsonl")

    def items(self, path: Path) -> Iterator[Item | Damage]:
        return jsonl_items(path) if path.suffix.lower() == ".jsonl" else super().items(path)

    def item(self, group: Group, tar: TarReader) -> Item:
        sample, layout = sample_from_group(group, tar)
        return Item(group.key, sample, layout)

    def sample(self, group: Group, tar: TarReader) -> Sample:
        return sample_from_group(group, tar)[0]

    def attached(self, tar: TarReader) -> set[str]:
        return claimed_images(tar)


def jsonl_items(path: Path) -> Iterator[Item]:
    for line in read_lines(path):
        key = f"line {line.number}"
        try:
            fields = parse_json_object(line.content(), key)
            key = record_key(fields, key)
            image = read_image_file(fields.get("image"), path.parent)
            captions = captions_from_json(fields, key)
            yield Item(key, make_sample(key, image, captions, fields), "jsonl")
        except BadSample as problem:
            yield Item(key, problem=problem)
