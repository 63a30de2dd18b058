from __future__ import annotations

import bz2
import gzip
import tracemalloc

import brotli
import pytest
import snappy
import zstandard

from rae_scale.data.cache.check import DamagedShard
from rae_scale.data.cache.decompress import CHUNK_BYTES, OPENERS, decompressed
from rae_scale.data.mds_index import COMPRESSIONS

COMPRESS = {
    "br": lambda data: brotli.compress(data, quality=5),
    "bz2": bz2.compress,
    "gz": gzip.compress,
    "snappy": snappy.compress,
    "zstd": zstandard.ZstdCompressor(level=3).compress,
}
DATA = b"".join(number.to_bytes(4, "big") for number in range(10_000))


def pieces_of(data: bytes, size: int):
    return (data[start : start + size] for start in range(0, len(data), size))


def test_every_compression_of_mosaicml_is_known() -> None:
    assert tuple(sorted(OPENERS)) == COMPRESSIONS == tuple(sorted(COMPRESS))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("size", [1000, 10**6])
def test_what_was_compressed_comes_back(compression: str, size: int) -> None:
    chunks = pieces_of(COMPRESS[compression](DATA), size)
    assert b"".join(decompressed(chunks, compression, len(DATA))) == DATA


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_damage_is_found(compression: str) -> None:
    data = COMPRESS[compression](DATA)
    for damaged in (
        b"",
        data[: len(data) // 2],
        b"\xff" * 50,
        data[:20] + bytes(byte ^ 0x5A for byte in data[20:40]) + data[40:],
    ):
        try:
            out = b"".join(decompressed(pieces_of(damaged, 1000), compression, len(DATA)))
        except DamagedShard:
            continue
        assert out != DATA  # which its size or its hash tells


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_bomb_does_not_fill_the_memory(compression: str) -> None:
    bomb = COMPRESS[compression](bytes(2**24))
    tracemalloc.start()
    with pytest.raises(DamagedShard, match=r"more than the index says|bytes where the index says 1000"):
        for piece in decompressed(iter([bomb]), compression, 1000):
            assert len(piece) <= CHUNK_BYTES
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "snappy", None)
    with pytest.raises(
        ValueError, match="compressed with snappy, which needs python-snappy; pip install python-snappy"
    ):
        list(decompressed(iter([b"x"]), "snappy", 10))
