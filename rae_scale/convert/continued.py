"""Writing on in a file whose format makes each part follow from those before, such as a zip with its checksums."""

from __future__ import annotations

import io
from typing import IO, Any

import torch
from torch import Tensor

from rae_scale.convert.casts import CastErrors
from rae_scale.convert.file_bytes import bytes_of
from rae_scale.convert.parts import Part
from rae_scale.convert.stretches import StretchWriter
from rae_scale.state.format import CheckpointError


class ContinuedFile(io.RawIOBase):
    """A file that can only be written from its beginning, in the same order each time. What an earlier attempt wrote of
    it, up to where `file` stands, is compared and not written again."""

    def __init__(self, file: IO[bytes], stretches: StretchWriter, casts: CastErrors) -> None:
        self.file, self.stretches, self.casts = file, stretches, casts
        self.there = file.tell()
        self.position = 0
        self.failed = False
        """Libraries end a file when they are left, in whatever way: what they write then is no part of it."""

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def kept(self, numel: int, dtype: torch.dtype) -> Tensor | None:
        """The elements that are on disk where the next bytes go; None if they are not all there."""
        if self.position + numel * dtype.itemsize > self.there:
            return None
        found = torch.empty(numel, dtype=dtype)
        self.file.seek(self.position)
        self.file.readinto(bytes_of(found))  # type: ignore[attr-defined]
        self.file.seek(self.there)
        return found

    def write(self, data: Any) -> int:
        """Raises CheckpointError if the earlier attempt wrote something else there."""
        view = memoryview(data).cast("B")
        if self.failed:
            return len(view)
        known = min(max(self.there - self.position, 0), len(view))
        if known and bytes_of(self.kept(known, torch.uint8)) != view[:known]:
            self.failed = True
            raise CheckpointError(
                f"{self.file.name} was begun in another way, perhaps by another version of a library; begin anew: the "
                "same command again"
            )
        if known < len(view):
            self.stretches.write(Part(view[known:], self.casts.to_json()))
        self.position += len(view)
        return len(view)
