"""Small images, tars and shards for the data tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae_scale.data.mds_writer import MDSWriter
from rae_scale.data.record import Sample


def gradient(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A smooth picture, uint8 [height, width, 3]: JPEG keeps it to within a few levels."""
    base = np.random.default_rng(seed).integers(0, 120, size=3)
    rows, columns = np.mgrid[0:height, 0:width]
    ramp = np.stack([rows * 100 / height, columns * 100 / width, (rows + columns) * 50 / (height + width)], axis=-1)
    return (base + ramp).astype(np.uint8)


def encode_image(format: str = "JPEG", width: int = 24, height: int = 16, seed: int = 0, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(gradient(width, height, seed)).convert(mode).save(buffer, format)
    return buffer.getvalue()


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def image() -> Callable[..., bytes]:
    """image(format="JPEG", width=24, height=16, seed=0, mode="RGB") -> an encoded picture."""
    return encode_image


@pytest.fixture
def pack() -> Callable[[Iterable[tuple[str, bytes]]], bytes]:
    """pack([(member name, data), ...]) -> the bytes of a tar."""
    return tar_bytes


@pytest.fixture
def tar(tmp_path: Path) -> Callable[..., Path]:
    """tar(members, name="a.tar") -> path of a tar that holds them."""

    def write(members: Iterable[tuple[str, bytes]], name: str = "a.tar") -> Path:
        path = tmp_path / name
        path.write_bytes(tar_bytes(members))
        return path

    return write


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., Path]:
    """shards(count or samples, name="mds", shard_bytes=4000) -> folder of MDS shards; keys `name-0`, `name-1`, ..."""

    def write(samples: int | list[Sample], name: str = "mds", shard_bytes: int = 4000) -> Path:
        if isinstance(samples, int):
            samples = [Sample(f"{name}-{i}", encode_image(seed=i), (f"caption {i}",)) for i in range(samples)]
        folder = tmp_path / name
        folder.mkdir()
        writer = MDSWriter(folder, shard_bytes)
        for sample in samples:
            writer.write(sample)
        writer.finish()
        return folder

    return write
