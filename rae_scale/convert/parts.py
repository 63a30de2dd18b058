"""From boxes of tensors to the bytes of a file, in order: while some are written, the next ones are read and cast."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rae_scale.convert.casts import CastErrors
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state.read import chunks_of

# Of one part of a tensor: read, hashed and cast while a core's own cache holds it, and in memory that is used again,
# where larger pieces would be given back to the system, which has to clear them for each next one.
CHUNK_BYTES = 1 << 20
MOST_AHEAD = 4  # parts that wait to be written


@dataclass(frozen=True)
class TensorOut:
    """A tensor of known form whose boxes are read when their turn comes, in any dtype; they are cast to `dtype`."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[Box], Tensor]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def chunks(self) -> Iterator[Box]:
        """The boxes in which it is read and written."""
        return chunks_of(whole(self.shape), CHUNK_BYTES // torch.float32.itemsize)


class Part(NamedTuple):
    """Bytes to write. casts: `CastErrors.to_json` with these, and none behind them."""

    data: memoryview
    casts: dict[str, Any]


def boxes_from(tensors: Iterable[TensorOut], position: int) -> Iterator[tuple[TensorOut, Box]]:
    """What is to be written from byte `position` behind the header on, in order."""
    start = 0
    for tensor in tensors:
        for box in tensor.chunks():
            if start >= position:
                yield tensor, box
            start += box.numel * tensor.dtype.itemsize


def parts_of(boxes: Iterable[tuple[TensorOut, Box]], casts: CastErrors) -> Iterator[Part]:
    """The bytes of each box. One thread reads and another casts, each one part after the other."""
    coming: deque[Future[Part]] = deque()
    with alone() as reader, alone() as caster:
        for tensor, box in boxes:
            coming.append(caster.submit(cast_part, tensor, box, reader.submit(tensor.read, box), casts))
            if len(coming) > MOST_AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def alone() -> ThreadPoolExecutor:
    """A thread whose operators use no others: several that share the cores would wait for each other in each."""
    return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))


def cast_part(tensor: TensorOut, box: Box, reading: Future[Tensor], casts: CastErrors) -> Part:
    found = reading.result()
    assert found.shape == box.shape, f"{tensor.key}: {tuple(found.shape)} was read for {box}"
    part = casts.cast(found, tensor.dtype, tensor.key)
    return Part(part.contiguous().reshape(-1).view(torch.uint8).numpy().data, casts.to_json())
