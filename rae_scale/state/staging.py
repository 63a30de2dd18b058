"""Host memory between the training thread, which copies tensors into it, and the thread that writes them to disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from rae_scale.parallel.boxes import boxes_of_range
from rae_scale.state.format import CheckpointError

BLOCK_BYTES = 64 << 20
SMALLEST_BLOCK_BYTES = 4096


class Staging:
    """A stream of float32 elements through a bounded number of blocks, which are used again and again: one thread puts
    tensors in, another takes their elements out in the same order.

    limit:  bytes. So much is allocated at the most, but never less than a block of `SMALLEST_BLOCK_BYTES`.
    pinned: page-locked memory, into which a GPU copies several times as fast. torch keeps it for the next stream.
    """

    def __init__(self, limit: int, pinned: bool) -> None:
        # Two at least, so that one is filled while another is written. torch rounds pinned memory up to powers of two.
        block_bytes = min(BLOCK_BYTES, max(SMALLEST_BLOCK_BYTES, 1 << ((limit // 2) | 1).bit_length() - 1))
        self._block_numel = block_bytes // torch.float32.itemsize
        self._most_blocks = max(1, limit // block_bytes)
        self._pinned = pinned
        self._blocks = 0
        self._free: list[Tensor] = []
        self._filling: Tensor | None = None
        self._filled = 0
        self._chunks: deque[tuple[Tensor, Tensor | None]] = deque()
        """Parts of blocks to be taken, and the block if a part is its last."""
        self._changed = threading.Condition()
        self._broken: str | None = None
        self._abandoned = False

    @property
    def allocated_bytes(self) -> int:
        """It never shrinks."""
        return self._blocks * self._block_numel * torch.float32.itemsize

    def put(self, tensor: Tensor) -> bool:
        """Copy `tensor`, part by part as there is room. False if the taker has given up: no further one is wanted."""
        done = 0
        while done < tensor.numel():
            block = self._block_with_room()
            if block is None:
                return False
            start, stop = self._filled, min(self._block_numel, self._filled + tensor.numel() - done)
            for box in boxes_of_range(tensor.shape, done, done + stop - start):
                place = block[self._filled : self._filled + box.numel]
                copy_to_host(place.view(box.shape), tensor[box.slices])
                self._filled += box.numel
            done += stop - start
            is_full = stop == self._block_numel
            self._filling = None if is_full else block
            with self._changed:
                self._chunks.append((block[start:stop], block if is_full else None))
                self._changed.notify_all()
        return True

    def take(self, numel: int) -> Iterator[Tensor]:
        """The next `numel` elements in parts [n], each valid until the next one is asked for.

        Raises:
            CheckpointError: they will never come.
        """
        while numel:
            with self._changed:
                self._changed.wait_for(lambda: self._chunks or self._broken is not None)
                if self._broken is not None:
                    raise CheckpointError(self._broken)
                chunk, finished = self._chunks.popleft()
            numel -= len(chunk)
            yield chunk
            if finished is not None:
                with self._changed:
                    self._free.append(finished)
                    self._changed.notify_all()

    def break_off(self, reason: str) -> None:
        """The putting thread cannot go on: `take` raises."""
        with self._changed:
            self._broken = reason
            self._changed.notify_all()

    def abandon(self) -> None:
        """The taking thread has ended: what is staged is forgotten, and `put` says so."""
        with self._changed:
            self._abandoned = True
            self._chunks.clear()
            self._free.clear()
            self._filling = None
            self._changed.notify_all()

    def _block_with_room(self) -> Tensor | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._abandoned or self._filling is not None or self._free or self._blocks < self._most_blocks
            )
            if self._abandoned:
                return None
            if self._filling is not None:
                return self._filling
            self._filled = 0
            if self._free:
                return self._free.pop()
            self._blocks += 1
        return torch.empty(self._block_numel, dtype=torch.float32, pin_memory=self._pinned)


def copy_to_host(place: Tensor, part: Tensor) -> None:
    """Copy `part` into host memory of its shape, complete on return: the next training step overwrites the source. The
    call waits for the stream that wrote it, too."""
    place.copy_(part.detach())
