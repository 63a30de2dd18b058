"""Reading ranges of tensors out of a checkpoint's files."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rae_scale.engines.base import Kind
from rae_scale.state.format import Index, key


class PieceReader:
    """Assembles any range from the pieces that overlap it. Files are mapped, so only what is asked for is read."""

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

    def read(self, kind: Kind, name: str, start: int, stop: int) -> Tensor | None:
        """Elements `start` to `stop` of a tensor, float32 [stop - start]; None if it has no such kind."""
        if name not in self.index or kind not in self.index[name].ranges:
            return None
        out = torch.empty(stop - start, dtype=torch.float32)
        for piece in self.index[name].ranges[kind]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                stored = self._open(piece.file).get_slice(key(kind, name, piece.start))
                out[first - start : last - start] = stored[first - piece.start : last - piece.start]
        return out

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
        return self._files[file]
