"""JSON lines files of any size, and the images that their lines name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rae_scale.data.record import BadSample
from rae_scale.data.tars import MAX_MEMBER_BYTES

MAX_LINE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Line:
    """A line that is not blank. `data` is None when it is too long to be a sample."""

    number: int
    offset: int
    data: bytes | None

    def content(self) -> bytes:
        if self.data is None:
            raise BadSample("bad json", f"line {self.number} is longer than {MAX_LINE_BYTES} bytes")
        return self.data


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file that are not blank, numbered from 1; memory holds one of them."""
    with open(path, "rb") as file:
        offset = 0
        for number, (size, data) in enumerate(bounded_lines(file), start=1):
            if data is None or data.strip():
                yield Line(number, offset, data)
            offset += size


def bounded_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file, each with its size; None in place of one that is too long to be a sample."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        too_long = len(line) > MAX_LINE_BYTES
        size = len(line)
        rest = line
        while too_long and rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
            size += len(rest)
        yield size, None if too_long else line


def record_key(fields: dict[str, Any], default: str) -> str:
    identifier = fields.get("id")
    return str(identifier) if isinstance(identifier, str | int) and str(identifier).isprintable() else default


def image_name(name: object) -> str | None:
    """The image that a line names; None when it names none. Raises BadSample for several, and for what is no name."""
    if name is None or name == "":
        return None
    if isinstance(name, list):
        raise BadSample("several images", f"{len(name)} images; one image per sample is supported")
    if not isinstance(name, str) or "\0" in name:
        raise BadSample("bad name", f"image {name!r} is no path")
    return name


def read_image_file(name: object, folder: Path) -> bytes | None:
    """The bytes of the image that a line names, relative to `folder`."""
    relative = image_name(name)
    if relative is None:
        return None
    path = folder / relative
    try:
        if not path.is_file():  # also keeps devices and pipes from being read
            raise BadSample("no image", f"{path} is not there or not a file")
        size = path.stat().st_size
        if size > MAX_MEMBER_BYTES:
            raise BadSample("member too large", f"{path} has {size} bytes (limit {MAX_MEMBER_BYTES})")
        return path.read_bytes()
    except OSError as error:
        raise BadSample("no image", f"{path}: {error.strerror}") from None
