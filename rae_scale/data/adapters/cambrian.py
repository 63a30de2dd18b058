"""Cambrian's conversations about images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from rae_scale.data.adapters.base import Adapter, Damage, Item
from rae_scale.data.adapters.line_index import open_index
from rae_scale.data.json_lines import image_name, read_image_file, read_lines, record_key
from rae_scale.data.layouts import IMAGE_SUFFIXES, make_sample
from rae_scale.data.record import BadSample
from rae_scale.data.tars import TAR_SUFFIXES, TarReader
from rae_scale.data.text import parse_json_object


@dataclass(frozen=True)
class Cambrian(Adapter):
    """Cambrian's conversations about images, and in text alone.

    `nyu-visionx/Cambrian-10M`: `Cambrian7M.jsonl` or `Cambrian7M_withsystemprompt.jsonl`, and the images in archives
    (`coco.tar.gz`; pieces like `allava.tar.gz_part1` have to be joined first).

        {"id": ..., "image": "coco/train2017/0001.jpg", "conversations": [{"from": "human", "value": ...}, ...]}

    Rows without an image are conversations in text. A row with several images is rejected. A leading turn from
    "system" goes in front of the first question.

    There are two ways to read it:

        input .jsonl            all rows, with the images unpacked under the folder `images`
        input .tar or .tar.gz   the rows about the images in this archive, from the JSON lines file `rows`; then the
                                rows without images come from the .jsonl as input, with `text_only=true`. Images that no
                                row names are not samples, and rows whose image is in none of the archives are in none.

    images:    folder of the unpacked images, for a .jsonl; by default its own.
    rows:      the JSON lines file, for an archive. A table of its images is made beside it once, `<file>.image.index`
               (16 bytes per line).
    text_only: of a .jsonl, leave out the rows about one image.
    prefix:    what goes before the names in an archive to give the names in the rows, such as `coco/`.
    """

    name: ClassVar[str] = "cambrian"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", *TAR_SUFFIXES)
    images: Path | None = None
    rows: Path | None = None
    text_only: bool = False
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.rows is not None and (self.images is not None or self.text_only):
            raise ValueError("rows is for archives as inputs, images and text_only for a .jsonl; give one or the other")
        if self.text_only and self.images is not None:
            raise ValueError("text_only=true reads no images; leave images out")
        if self.prefix and self.rows is None:
            raise ValueError(f"prefix={self.prefix} is for archives as inputs; give rows as well, or leave it out")

    def side_files(self) -> tuple[Path, ...]:
        return () if self.rows is None else (self.rows,)

    def check(self, path: Path) -> None:
        super().check(path)
        is_archive = path.suffix.lower() != ".jsonl"
        if is_archive and self.rows is None:
            raise ValueError(f"{path}: an archive of images needs the file of rows about them: rows=Cambrian7M.jsonl")
        if not is_archive and self.rows is not None:
            raise ValueError(f"{path}: rows={self.rows} is for archives as inputs; leave it out for a .jsonl")
        if self.images is not None and not self.images.is_dir():
            raise FileNotFoundError(f"{self.images}: no such folder; check images=")

    def items(self, path: Path) -> Iterator[Item | Damage]:
        return self.items_of_rows(path) if self.rows is None else self.items_of_archive(path, self.rows)

    def items_of_rows(self, path: Path) -> Iterator[Item]:
        for line in read_lines(path):
            key = f"line {line.number}"
            try:
                fields = parse_json_object(line.content(), key)
                if self.text_only and isinstance(fields.get("image"), str) and fields["image"]:
                    continue  # read with the archive that holds it
                key = record_key(fields, key)
                image = read_image_file(fields.get("image"), self.images or path.parent)
                yield self.item(key, image, fields)
            except BadSample as problem:
                yield Item(key, problem=problem)

    def items_of_archive(self, path: Path, rows: Path) -> Iterator[Item | Damage]:
        index = open_index(rows, "image")
        with TarReader(path) as tar:
            for group in tar.groups:
                for member in group.members.values():
                    name = self.prefix + member.name
                    if PurePosixPath(name).suffix.lower().removeprefix(".") not in IMAGE_SUFFIXES:
                        continue
                    for line in index.find(name):
                        key = name
                        try:
                            fields = parse_json_object(line.content(), name)
                            key = record_key(fields, name)
                            if group.problem is not None:
                                raise group.problem
                            yield self.item(key, tar.read(member), fields)
                        except BadSample as problem:
                            yield Item(key, problem=problem)
            if tar.damage:
                yield Damage(tar.damage)

    def item(self, key: str, image: bytes | None, fields: dict[str, Any]) -> Item:
        image_name(fields.get("image"))
        if "conversations" not in fields:
            raise BadSample("bad conversation", f"{key} has no conversations")
        conversations = merge_system_turn(fields["conversations"])
        return Item(key, make_sample(key, image, (), {**fields, "conversations": conversations}), self.name)


def merge_system_turn(conversations: Any) -> Any:
    """Turns without a leading one from "system": its text stands in front of the question that follows it."""
    is_turns = isinstance(conversations, list) and all(isinstance(turn, dict) for turn in conversations)
    if not is_turns or len(conversations) < 2 or conversations[0].get("from") != "system":
        return conversations
    system, question, *rest = conversations
    texts = [system.get("value"), question.get("value")]
    if not all(isinstance(text, str) for text in texts):
        return conversations  # refused with the other turns that are no text
    return [{**question, "value": "\n".join(text for text in texts if text.strip())}, *rest]
