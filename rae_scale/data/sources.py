"""The input files of a build, one item per sample: a tar, or JSON lines with images beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rae_scale.data.layouts import IMAGE_SUFFIXES, captions_from_json, claimed_images, make_sample, sample_from_group
from rae_scale.data.record import BadSample, Sample
from rae_scale.data.tars import MAX_MEMBER_BYTES, TarReader
from rae_scale.data.text import parse_json_object

MAX_LINE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Item:
    """One sample of an input file, or the reason why there is none."""

    key: str
    sample: Sample | None = None
    layout: str = ""
    problem: BadSample | None = None


class Source:
    """An input file. Iterate it once; afterwards `damage` says why it ended early, if it did."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.damage: str | None = None
        if self.path.suffix.lower() not in READERS:
            raise ValueError(f"{path}: unknown kind of input; give a .tar or a .jsonl file")
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file; check the path (a pattern must be expanded by the shell)")

    def __iter__(self) -> Iterator[Item]:
        return READERS[self.path.suffix.lower()](self)


def tar_items(source: Source) -> Iterator[Item]:
    with TarReader(source.path) as tar:
        source.damage = tar.damage
        claimed = claimed_images(tar)
        for group in tar.groups:
            if group.members.keys() <= IMAGE_SUFFIXES and all(m.name in claimed for m in group.members.values()):
                continue
            try:
                sample, layout = sample_from_group(group, tar)
                yield Item(group.key, sample, layout)
            except BadSample as problem:
                yield Item(group.key, problem=problem)


def jsonl_items(source: Source) -> Iterator[Item]:
    with open(source.path, "rb") as file:
        for number, line in enumerate(bounded_lines(file), start=1):
            key = f"line {number}"
            if line is not None and not line.strip():
                continue
            try:
                if line is None:
                    raise BadSample("bad json", f"{key} is longer than {MAX_LINE_BYTES} bytes")
                fields = parse_json_object(line, key)
                key = record_key(fields, key)
                image = read_image_file(fields.get("image"), source.path.parent)
                captions = captions_from_json(fields, key)
                yield Item(key, make_sample(key, image, captions, fields), "jsonl")
            except BadSample as problem:
                yield Item(key, problem=problem)


READERS = {".tar": tar_items, ".jsonl": jsonl_items}


def bounded_lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """The lines of a file; None in place of one that is too long to be a sample."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        too_long = len(line) > MAX_LINE_BYTES
        rest = line
        while too_long and rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
        yield None if too_long else line


def record_key(fields: dict[str, Any], default: str) -> str:
    identifier = fields.get("id")
    return str(identifier) if isinstance(identifier, str | int) and str(identifier).isprintable() else default


def read_image_file(name: object, folder: Path) -> bytes | None:
    """The bytes of the image that a JSON line names, relative to the folder of the JSON lines file."""
    if name is None or name == "":
        return None
    if isinstance(name, list):
        raise BadSample("several images", f"{len(name)} images; one image per sample is supported")
    if not isinstance(name, str) or "\0" in name:
        raise BadSample("bad name", f"image {name!r} is no path")
    path = folder / name
    try:
        if not path.is_file():  # also keeps devices and pipes from being read
            raise BadSample("no image", f"{path} is not there or not a file")
        size = path.stat().st_size
        if size > MAX_MEMBER_BYTES:
            raise BadSample("member too large", f"{path} has {size} bytes (limit {MAX_MEMBER_BYTES})")
        return path.read_bytes()
    except OSError as error:
        raise BadSample("no image", f"{path}: {error.strerror}") from None
