"""Shards as mosaicml-streaming compresses them, in pieces: what a file swells to is seen before it fills anything."""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from rae_scale.data.cache.check import DamagedShard

CHUNK_BYTES = 2**20


class ChunkStream(io.RawIOBase):
    """Chunks as a file to read from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def decompressed(chunks: Iterator[bytes], compression: str, limit: int) -> Iterator[bytes]:
    """Pieces of at most CHUNK_BYTES, of what should become at most `limit` bytes.

    Raises DamagedShard when they are not, and ValueError when what decompresses them is not installed.
    """
    try:
        pieces = OPENERS[compression](cast(BinaryIO, ChunkStream(chunks)), limit)
    except ModuleNotFoundError as error:
        package = {"brotli": "Brotli", "snappy": "python-snappy"}.get(error.name or "", error.name)
        raise ValueError(f"compressed with {compression}, which needs {package}; pip install {package}") from None
    while True:
        try:
            piece = next(pieces, b"")
        except (OSError, EOFError, zlib.error) as error:
            raise DamagedShard(f"cannot be decompressed with {compression} ({error})") from None
        if not piece:
            return
        limit -= len(piece)
        if limit < 0:
            raise DamagedShard("decompresses to more than the index says")
        yield piece


def read_pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(CHUNK_BYTES):
        yield piece


def open_gzip(stream: BinaryIO, limit: int) -> Iterator[bytes]:
    return read_pieces(cast(BinaryIO, gzip.GzipFile(fileobj=stream)))


def open_bz2(stream: BinaryIO, limit: int) -> Iterator[bytes]:
    return read_pieces(cast(BinaryIO, bz2.BZ2File(stream)))


def open_zstd(stream: BinaryIO, limit: int) -> Iterator[bytes]:
    import zstandard

    reader = zstandard.ZstdDecompressor().stream_reader(stream, read_size=CHUNK_BYTES, read_across_frames=True)
    return translated(read_pieces(cast(BinaryIO, reader)), zstandard.ZstdError)


def open_brotli(stream: BinaryIO, limit: int) -> Iterator[bytes]:
    import brotli

    return translated(brotli_pieces(brotli.Decompressor(), stream), brotli.error)


def brotli_pieces(decompressor: Any, stream: BinaryIO) -> Iterator[bytes]:
    while not decompressor.is_finished():
        data = b""
        if decompressor.can_accept_more_data() and not (data := stream.read(CHUNK_BYTES)):
            raise EOFError("it was cut")
        if piece := decompressor.process(data, output_buffer_limit=CHUNK_BYTES):
            yield piece


def open_snappy(stream: BinaryIO, limit: int) -> Iterator[bytes]:
    import snappy

    return translated(snappy_pieces(snappy.uncompress, stream, limit), snappy.UncompressError)


def snappy_pieces(uncompress: Callable[[bytes], bytes], stream: BinaryIO, limit: int) -> Iterator[bytes]:
    """This format has no pieces, but says first how long it will be: 7 bits a byte, the low ones first."""
    data = b"".join(read_pieces(stream))
    length = 0
    for position, byte in enumerate(data[:5]):
        length |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            break
    if length > limit:
        raise OSError(f"{length} bytes where the index says {limit}")
    yield uncompress(data)


def translated(pieces: Iterator[bytes], kind: type[Exception]) -> Iterator[bytes]:
    try:
        yield from pieces
    except kind as error:
        raise OSError(str(error) or kind.__name__) from None


OPENERS: dict[str, Callable[[BinaryIO, int], Iterator[bytes]]] = {
    "br": open_brotli,
    "bz2": open_bz2,
    "gz": open_gzip,
    "snappy": open_snappy,
    "zstd": open_zstd,
}
