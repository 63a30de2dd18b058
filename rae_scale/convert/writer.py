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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import xxhash
from torch import Tensor

from rae_scale.convert.casts import CastErrors
from rae_scale.convert.continued import ContinuedFile
from rae_scale.convert.journal import FileRecord, Journal
from rae_scale.convert.parts import Part, TensorOut, boxes_from, parts_of
from rae_scale.convert.stretches import StretchWriter
from rae_scale.state.format import READ_BYTES, CheckpointError, file_hash, sync, sync_folder, temporary_folder
from rae_scale.state.tensorfile import TensorToWrite, encode_header

WriteFile = Callable[[IO[bytes], Sequence[TensorToWrite]], None]
"""Writes a file of another format from beginning to end, such as `torchfile.write_torch`."""


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
            with StretchWriter(self.journal, name, file, digest) as stretches:
                if there == 0:
                    stretches.write(Part(memoryview(header), self.casts.to_json()))
                for part in parts_of(boxes_from(tensors, there - len(header)), self.casts):
                    stretches.write(part)
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

    def keep_prefix(self, file: IO[bytes], record: FileRecord, header: bytes) -> xxhash.xxh3_128:
        """Cut `file` behind what is as the journal says, stand there, and return the hash of what is before."""
        digest, good = xxhash.xxh3_128(), 0
        for stretch in record.stretches if file.read(len(header)) == header else ():
            # Typed as its base class by the library.
            longer = cast(xxhash.xxh3_128, digest.copy())
            for block in read_range(file, stretch.start, stretch.stop):
                longer.update(block)
            if longer.hexdigest() != stretch.digest:
                break
            digest, good = longer, stretch.stop
            self.restore_casts(stretch.casts)
        file.truncate(good)
        file.seek(good)
        return digest

    def restore_casts(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.casts = CastErrors.from_json(state)

    def write_as(self, name: str, tensors: Sequence[TensorOut], write: WriteFile) -> str:
        """Write a file of another format and return its xxh3-128. What an earlier attempt wrote of it is kept: `write`
        gets its tensors from there."""
        path, record = self.place(name)
        if record.done is not None:
            return record.done
        with path.open("r+b" if path.is_file() else "w+b") as file:
            digest = self.keep_prefix(file, record, b"")
            with StretchWriter(self.journal, name, file, digest) as stretches:
                continued = ContinuedFile(file, stretches, self.casts)
                write(cast(IO[bytes], continued), [self.to_write(tensor, continued) for tensor in tensors])
        return self.finish_file(name, digest.hexdigest())

    def to_write(self, tensor: TensorOut, file: ContinuedFile) -> TensorToWrite:
        def fetch() -> Iterator[Tensor]:
            try:
                for box in tensor.chunks():
                    kept = file.kept(box.numel, tensor.dtype)
                    yield self.casts.cast(tensor.read(box), tensor.dtype, tensor.key) if kept is None else kept
            except BaseException:
                file.failed = True
                raise

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


def read_range(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    file.seek(start)
    while start < stop and (block := file.read(min(READ_BYTES, stop - start))):
        start += len(block)
        yield block
