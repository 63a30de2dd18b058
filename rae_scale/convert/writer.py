"""Writing a folder of tensors so that being killed at any point costs little.

    OUT                     appears when everything is in it and on disk
    .OUT.tmp/               what it is until then
    .OUT.journal            a line for every stretch of a file that is on disk, with its hash

A second attempt compares what is there with the journal and goes on behind it, unless it is another conversion: the
journal's first line says which one it belongs to, its source's state included.

    with FolderWriter(out, {"source": fingerprint(path), ...}) as writer:
        writer.write("model.safetensors", tensors, metadata)
        (writer.folder / "config.yaml").write_bytes(...)      # what is written past the journal is written anew
        writer.finish()
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch
import xxhash
from torch import Tensor

from rae_scale.convert.casts import CastErrors
from rae_scale.convert.journal import FileRecord, Journal, Stretch
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state.format import READ_BYTES, CheckpointError, file_hash, sync, sync_folder, temporary_folder
from rae_scale.state.read import chunks_of
from rae_scale.state.tensorfile import TensorToWrite, encode_header

# Of one part of a tensor. Memory of up to 32 MiB is used again, where more would be taken from the system each time.
CHUNK_BYTES = 16 << 20
STRETCH_BYTES = 64 << 20  # written between two lines of the journal, at least


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


WriteFile = Callable[[Path, Sequence[TensorToWrite]], None]
"""Writes a file of another format whole, such as `torchfile.write_torch`."""


class FolderWriter:
    """Writes the folder `final`; see the module. What it is for, `purpose`, is JSON-able and decides whether an earlier
    attempt is continued. `message` says whether one was, "" if there was none.

    Raises:
        CheckpointError: `final` exists, or another process is writing it.
    """

    def __init__(self, final: Path, purpose: Mapping[str, Any]) -> None:
        if final.exists():
            raise CheckpointError(f"{final} exists; write into a new folder, or remove that one first")
        self.final, self.folder = final, temporary_folder(final)
        self.casts = CastErrors()
        self.message = ""
        final.parent.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(final.parent / f".{final.name}.journal")
        purpose = json.loads(json.dumps(purpose))
        self.files: dict[str, FileRecord] = {}
        if self.journal.purpose == purpose and self.folder.is_dir():
            self.keep()
        else:
            self.begin(purpose)

    def keep(self) -> None:
        """Go on from what an earlier attempt left; remove what its journal does not know."""
        self.files = self.journal.records()
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            elif not path.is_dir() and path.relative_to(self.folder).as_posix() not in self.files:
                path.unlink()
        held = sum(record.held for record in self.files.values())
        self.message = f"continuing an interrupted conversion: {held / 2**20:,.1f} MiB are there"

    def begin(self, purpose: Mapping[str, Any]) -> None:
        if (earlier := self.journal.purpose) is not None:
            differing = ", ".join(key for key, value in purpose.items() if earlier.get(key) != value)
            why = f"its {differing} changed" if differing else "its files are gone"
            self.message = f"an interrupted conversion cannot be continued, since {why}: beginning anew"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.journal.begin(purpose)

    def write(self, name: str, tensors: Sequence[TensorOut], metadata: Mapping[str, str]) -> str:
        """Write a safetensors file and return its xxh3-128. What an earlier attempt wrote of it is kept."""
        path, record = self.place(name)
        if record.done is not None:
            return record.done
        header = encode_header(((tensor.key, tensor.shape, tensor.dtype) for tensor in tensors), metadata)
        with path.open("r+b" if path.is_file() else "w+b") as file:
            digest = self.keep_prefix(file, record, header)
            there = file.tell()
            stretch = StretchWriter(self, name, file, digest)
            if there == 0:
                stretch.write(memoryview(header))
            for tensor, part in read_ahead(boxes_from(tensors, there - len(header))):
                stretch.write(self.bytes_of(tensor, part))
                if stretch.length >= STRETCH_BYTES:
                    stretch.note()
            stretch.note()
        return self.finish_file(name, digest.hexdigest())

    def place(self, name: str) -> tuple[Path, FileRecord]:
        """Where a file is written, and what is there of it. `done` is set only if all of it is."""
        record = self.files.setdefault(name, FileRecord())
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if record.done is not None:
            if path.is_file() and file_hash(path) == record.done:
                self.restore_casts(record.casts)
            else:
                record.done = None
        return path, record

    def bytes_of(self, tensor: TensorOut, part: Tensor) -> memoryview:
        part = self.casts.cast(part, tensor.dtype, tensor.key)
        return part.contiguous().reshape(-1).view(torch.uint8).numpy().data

    def keep_prefix(self, file: IO[bytes], record: FileRecord, header: bytes) -> xxhash.xxh3_128:
        """Cut `file` behind what is as the journal says, stand there, and return the hash of what is before."""
        digest, good = xxhash.xxh3_128(), 0
        for stretch in record.stretches if file.read(len(header)) == header else ():
            # Typed as its base class by the library.
            own, whole_file = xxhash.xxh3_128(), cast(xxhash.xxh3_128, digest.copy())
            for block in read_range(file, stretch.start, stretch.stop):
                own.update(block)
                whole_file.update(block)
            if own.hexdigest() != stretch.digest:
                break
            digest, good = whole_file, stretch.stop
            self.restore_casts(stretch.casts)
        file.truncate(good)
        file.seek(good)
        return digest

    def restore_casts(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.casts = CastErrors.from_json(state)

    def write_whole(self, name: str, tensors: Sequence[TensorOut], write: WriteFile) -> str:
        """Write a file of another format and return its xxh3-128. One that was interrupted is written anew."""
        path, record = self.place(name)
        if record.done is not None:
            return record.done
        write(path, [self.to_write(tensor) for tensor in tensors])
        return self.finish_file(name, file_hash(path))

    def to_write(self, tensor: TensorOut) -> TensorToWrite:
        def fetch() -> Iterator[Tensor]:
            for box in tensor.chunks():
                yield self.casts.cast(tensor.read(box), tensor.dtype, tensor.key)

        return TensorToWrite(tensor.key, tensor.shape, tensor.dtype, fetch)

    def finish_file(self, name: str, digest: str) -> str:
        self.casts.settle()
        sync_folder((self.folder / name).parent)
        self.journal.note_done(name, digest, self.casts.to_json())
        return digest

    def finish(self) -> None:
        """Give the folder its name."""
        for path in self.folder.rglob("*"):
            if path.is_dir():
                sync_folder(path)
            elif path.relative_to(self.folder).as_posix() not in self.files:
                with path.open("rb") as file:
                    sync(file.fileno())
        sync_folder(self.folder)
        os.rename(self.folder, self.final)
        sync_folder(self.final.parent)
        self.journal.path.unlink()

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, CheckpointError):
            # It would fail again; what was interrupted in any other way can be continued.
            shutil.rmtree(self.folder, ignore_errors=True)
            self.journal.path.unlink(missing_ok=True)
        self.journal.close()


def boxes_from(tensors: Iterable[TensorOut], position: int) -> Iterator[tuple[TensorOut, Box]]:
    """What is to be written from byte `position` behind the header on, in order."""
    start = 0
    for tensor in tensors:
        for box in tensor.chunks():
            if start >= position:
                yield tensor, box
            start += box.numel * tensor.dtype.itemsize


def read_ahead(boxes: Iterable[tuple[TensorOut, Box]]) -> Iterator[tuple[TensorOut, Tensor]]:
    """The elements of each box; while they are being written, those of the next one are read."""
    coming: deque[tuple[TensorOut, Box, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(1) as reader:
        for tensor, box in boxes:
            coming.append((tensor, box, reader.submit(tensor.read, box)))
            if len(coming) > 1:
                yield first_of(coming)
        while coming:
            yield first_of(coming)


def first_of(coming: deque[tuple[TensorOut, Box, Future[Tensor]]]) -> tuple[TensorOut, Tensor]:
    """A function of its own, which keeps no part alive that was handed out."""
    tensor, box, part = coming.popleft()
    found = part.result()
    assert found.shape == box.shape, f"{tensor.key}: {tuple(found.shape)} was read for {box}"
    return tensor, found


class StretchWriter:
    """Writes on, and notes in the journal what is on disk."""

    def __init__(self, writer: FolderWriter, name: str, file: IO[bytes], digest: xxhash.xxh3_128) -> None:
        self.writer, self.name, self.file, self.digest = writer, name, file, digest
        self.start, self.length = file.tell(), 0
        self.own = xxhash.xxh3_128()

    def write(self, data: memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.own.update(data)
        self.length += len(data)

    def note(self) -> None:
        if not self.length:
            return
        self.file.flush()
        sync(self.file.fileno())
        stop = self.start + self.length
        stretch = Stretch(self.start, stop, self.own.hexdigest(), self.writer.casts.to_json())
        self.writer.journal.note_stretch(self.name, stretch)
        self.start, self.length, self.own = stop, 0, xxhash.xxh3_128()


def read_range(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    file.seek(start)
    while start < stop and (block := file.read(min(READ_BYTES, stop - start))):
        start += len(block)
        yield block
