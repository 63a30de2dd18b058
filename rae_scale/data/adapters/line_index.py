"""Finding lines of a large JSON lines file by the value of one field, without holding the file in memory.

The index lies beside the file, is made once, and is shared by all processes through the page cache: 16 bytes per line,
sorted by the hash of the value. Looking up is a binary search and a read.
"""

from __future__ import annotations

import fcntl
import os
import struct
from array import array
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import xxhash

from rae_scale.data.json_lines import Line, read_lines
from rae_scale.data.mds_writer import write_durably
from rae_scale.data.record import BadSample
from rae_scale.data.text import parse_json_object

ENTRY = np.dtype([("hash", "<u8"), ("offset", "<u8")])
HEADER = struct.Struct("<8sQQ")  # magic, size and time of change (nanoseconds) of the file that it belongs to
MAGIC = b"RAELINE1"
READ_BYTES = 2**14


class LineIndex:
    """The lines of `path` by the value of `field`, a text or a whole number. Lines without one cannot be found.

    Raises ValueError for a file with a line that is no JSON object, and when the index cannot be written beside it.
    """

    def __init__(self, path: Path, field: str) -> None:
        self.path = path
        self.field = field
        self._file = open(path, "rb")  # noqa: SIM115  for as long as the process looks lines up
        table = path.with_name(f"{path.name}.{field}.index")
        state = os.fstat(self._file.fileno())
        header = HEADER.pack(MAGIC, state.st_size, state.st_mtime_ns)
        if not is_current(table, header):
            self._make(table, header)
        count = (table.stat().st_size - HEADER.size) // ENTRY.itemsize
        self._entries = (
            np.memmap(table, ENTRY, "r", offset=HEADER.size, shape=(count,)) if count else np.empty(0, ENTRY)
        )

    def find(self, value: str) -> Iterator[Line]:
        """The lines whose field is `value`, in the order of the file."""
        key = np.uint64(hash_of(value))
        begin = int(np.searchsorted(self._entries["hash"], key))
        while begin < len(self._entries) and self._entries["hash"][begin] == key:
            offset = int(self._entries["offset"][begin])
            data = self._line_at(offset)
            if field_value(data, self.field, f"{self.path} at byte {offset}") == value:
                yield Line(0, offset, data)
            begin += 1

    def _line_at(self, offset: int) -> bytes:
        data = b""
        # pread: processes that were forked share the position of the file.
        while not data.endswith(b"\n") and (more := os.pread(self._file.fileno(), READ_BYTES, offset + len(data))):
            data += more.partition(b"\n")[0] + (b"\n" if b"\n" in more else b"")
        return data

    def _make(self, table: Path, header: bytes) -> None:
        try:
            lock = open(table.with_name(f"{table.name}.lock"), "wb")  # noqa: SIM115  closed by the with below
        except OSError as error:
            raise ValueError(
                f"{table}: the index of {self.path.name} cannot be written ({error.strerror}); copy the file "
                "to a folder that can be written"
            ) from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the first process makes it, the others wait and find it made
            if not is_current(table, header):
                entries = np.frombuffer(array("Q", chain.from_iterable(self._read())), ENTRY).copy()
                entries.sort(order=("hash", "offset"))
                write_durably(table, (header, entries.tobytes()))

    def _read(self) -> Iterator[tuple[int, int]]:
        for line in read_lines(self.path):
            where = f"{self.path}, line {line.number}"
            try:
                value = field_value(line.content(), self.field, where)
            except BadSample as problem:
                raise ValueError(f"{where}: {problem.detail}; repair or remove the line") from None
            if value is not None:
                yield hash_of(value), line.offset


@lru_cache(maxsize=4)
def open_index(path: Path, field: str) -> LineIndex:
    """The index of a file, opened once per process."""
    return LineIndex(path, field)


def is_current(table: Path, header: bytes) -> bool:
    try:
        with open(table, "rb") as file:
            return file.read(HEADER.size) == header
    except FileNotFoundError:
        return False


def field_value(line: bytes, field: str, where: str) -> str | None:
    value = parse_json_object(line, where).get(field)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def hash_of(value: str) -> int:
    return xxhash.xxh3_64_intdigest(value.encode("utf-8", "surrogatepass"))
