"""Reading boxes of tensors out of a checkpoint's files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rae_scale.engines.base import Kind
from rae_scale.parallel.boxes import Box, boxes_of_range
from rae_scale.state.index import Index, key

CHUNK_BYTES = 256 << 20


class PieceReader:
    """Assembles any box from the stored ones that overlap it. Files are mapped, so only what is asked for is read."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self.index = index
        self._files: dict[str, Any] = {}

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()

    def read(self, kind: Kind, name: str, box: Box) -> Tensor | None:
        """The elements in `box` of a tensor, float32 of the box's shape; None if there is no such tensor or kind."""
        if name not in self.index or kind not in self.index[name].pieces:
            return None
        out = torch.empty(box.shape, dtype=torch.float32)
        for stored in self.index[name].pieces[kind]:
            common = stored.box.intersect(box)
            if common is not None:
                source = self._open(stored.file).get_slice(key(kind, name, stored.box))
                # A view of the mapped file. The copy makes the result outlive the file.
                out[common.relative_to(box).slices] = source[common.relative_to(stored.box).slices]
        return out

    def chunks(self, kind: Kind, name: str, box: Box, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """The elements in `box` in row-major order, at most `chunk_bytes` at a time.

        Raises:
            KeyError: there is no such tensor or kind.
        """
        for part in chunks_of(box, chunk_bytes // torch.float32.itemsize):
            found = self.read(kind, name, part)
            if found is None:
                raise KeyError(f"{self.folder} has no {kind} of {name}")
            yield found

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
        return self._files[file]


def chunks_of(box: Box, numel: int) -> Iterator[Box]:
    """`box` cut into boxes of at most `numel` elements that follow each other in row-major order."""
    for start in range(0, box.numel, numel):
        for part in boxes_of_range(box.shape, start, min(start + numel, box.numel)):
            first = tuple(corner + offset for corner, offset in zip(box.start, part.start, strict=True))
            yield Box(first, tuple(corner + length for corner, length in zip(first, part.shape, strict=True)))
