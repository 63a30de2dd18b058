"""Write the shapes world as webdataset tars: `key.jpg`, `key.txt` (caption) and `key.json` (GenEval metadata)."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import simplejpeg

from rae_scale.data.shapes.render import Bytes, render
from rae_scale.data.shapes.world import Scene, WorldConfig, check_seed, sample_scene


def write_tars(
    out_dir: str | Path,
    count: int,
    seed: int = 0,
    config: WorldConfig | None = None,
    samples_per_tar: int = 10_000,
    quality: int = 95,
) -> list[Path]:
    """Write scenes 0 .. count-1 of the stream `seed` and return the tars' paths.

    The same arguments give the same bytes. A tar appears under its name only when it is whole, so an interrupted run
    is repeated by the same call.

    Raises:
        ValueError: a count below 1, a seed kept for evaluation, or a folder that holds other tars.
    """
    for name, value in (("count", count), ("samples_per_tar", samples_per_tar)):
        if value < 1:
            raise ValueError(f"{name}={value} writes nothing; choose 1 or more")
    check_seed(seed)
    config = config or WorldConfig()
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, samples_per_tar)
    paths = [out_dir / f"shapes-{number:05d}.tar" for number in range(len(starts))]
    others = sorted(set(out_dir.glob("*.tar")) - set(paths))
    if others:
        raise ValueError(
            f"{out_dir} already holds {others[0].name}, which this set does not write; use an empty folder"
        )
    for path, start in zip(paths, starts, strict=True):
        indices = range(start, min(start + samples_per_tar, count))
        _write_tar(path, (_members(index, sample_scene(seed, index, config), quality) for index in indices))
    return paths


def encode_jpeg(image: Bytes, quality: int, subsampling: str = "444") -> bytes:
    return bytes(simplejpeg.encode_jpeg(image, quality=quality, colorspace="RGB", colorsubsampling=subsampling))


def _members(index: int, scene: Scene, quality: int) -> list[tuple[str, bytes]]:
    key = f"{index:08d}"
    return [
        (f"{key}.jpg", encode_jpeg(render(scene), quality)),
        (f"{key}.txt", scene.caption.encode()),
        (f"{key}.json", json.dumps(scene.metadata).encode()),
    ]


def _write_tar(path: Path, samples: Iterator[list[tuple[str, bytes]]]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for members in samples:
                for name, content in members:
                    info = tarfile.TarInfo(name)  # mtime, uid and gid stay 0: the bytes depend on the samples alone
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
