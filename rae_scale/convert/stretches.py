"""Writing a file in stretches, each of which is noted in the journal once it is on disk."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO, Any

import xxhash

from rae_scale.convert.journal import Journal, Stretch
from rae_scale.convert.parts import Part
from rae_scale.state.format import sync

STRETCH_BYTES = 64 << 20  # at least


class StretchWriter:
    """Writes on where `file` stands. While one stretch goes to the disk, which a thread waits for, the next is written.

    digest: of what is before in the file; in the end, of all of it.
    """

    def __init__(self, journal: Journal, name: str, file: IO[bytes], digest: xxhash.xxh3_128) -> None:
        self.journal, self.name, self.file, self.digest = journal, name, file, digest
        self.start, self.length = file.tell(), 0
        self.casts: dict[str, Any] = {}
        self.syncer = ThreadPoolExecutor(1)
        self.syncing: Future[None] | None = None

    def write(self, part: Part) -> None:
        self.file.write(part.data)
        self.digest.update(part.data)
        self.length += len(part.data)
        self.casts = part.casts
        if self.length >= STRETCH_BYTES:
            self.end_stretch()

    def end_stretch(self) -> None:
        if not self.length:
            return
        self.file.flush()
        self.wait()
        stop = self.start + self.length
        self.syncing = self.syncer.submit(self.note, Stretch(self.start, stop, self.digest.hexdigest(), self.casts))
        self.start, self.length = stop, 0

    def note(self, stretch: Stretch) -> None:
        sync(self.file.fileno())
        # Memory for the next stretch, which would otherwise be taken from what others keep there.
        os.posix_fadvise(self.file.fileno(), stretch.start, stretch.stop - stretch.start, os.POSIX_FADV_DONTNEED)
        self.journal.note_stretch(self.name, stretch)

    def wait(self) -> None:
        """Until the stretch before is on disk."""
        if self.syncing is not None:
            self.syncing.result()

    def __enter__(self) -> StretchWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.end_stretch()
                self.wait()
        finally:
            self.syncer.shutdown()
