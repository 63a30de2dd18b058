"""Pictures to read: made ones that are as much work as photographs, and copies in the form of each library."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import simplejpeg

from rae_scale.data.decode import read_header
from rae_scale.data.mds_writer import MDSWriter
from rae_scale.data.record import Sample

QUALITY = 90
CONTRAST = 50.0  # levels of 255, standard deviation of the brightness
SLOPE = 1.5  # of the noise's amplitude over its frequency: files are then as large as a photograph's
COLOUR = 0.25  # of that, for each colour's distance from it
CAPTION = "clouds of no shape in many colours, as if a photograph of the sky had been taken apart, number {number}"
SHARD_BYTES = 1 << 26
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def made_samples(count: int, size: int) -> Iterable[Sample]:
    """Captioned JPEGs of `size` pixels a side, always the same: noise whose detail is a photograph's.

    Detail is what takes a decoder's time: at 512 pixels a file has about 69 KB and takes 1.2 ms, where ten photographs
    had 65 KB and took 1.0 ms on the same machine.
    """
    for number in range(count):
        image = clouds(size, np.random.default_rng(number))
        data = simplejpeg.encode_jpeg(image, quality=QUALITY, colorspace="RGB", colorsubsampling="420")
        yield Sample(f"{number:08d}", bytes(data), (CAPTION.format(number=number),))


def clouds(size: int, generator: np.random.Generator) -> np.ndarray:
    """uint8 [size, size, 3]."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    layers = []
    for _ in range(4):  # brightness, and each colour's distance from it
        noise = generator.standard_normal((2, *frequency.shape)) / frequency**SLOPE
        layer = np.fft.irfft2(noise[0] + 1j * noise[1], s=(size, size))
        layers.append(layer / layer.std())
    levels = 128 + CONTRAST * (layers[0][..., None] + COLOUR * np.stack(layers[1:], axis=-1))
    return levels.clip(0, 255).astype(np.uint8)


def make_shards(folder: Path, images: int, size: int) -> Path:
    """MDS shards of `made_samples`."""
    return write_shards(folder / "shards", made_samples(images, size))


def write_shards(folder: Path, samples: Iterable[Sample]) -> Path:
    folder.mkdir(parents=True)
    writer = MDSWriter(folder, SHARD_BYTES)
    for sample in samples:
        writer.write(sample)
    writer.finish()
    return folder


def repeated(samples: Sequence[Sample], count: int) -> Iterable[Sample]:
    """`count` samples in turn, under names of their own: so many that nobody comes to the end of an epoch."""
    for number, sample in enumerate(islice(cycle(samples), count)):
        yield Sample(f"{number:08d}", sample.image, sample.captions)


def write_tars(folder: Path, samples: Iterable[Sample], tars: int) -> tuple[Path, ...]:
    """webdataset tars, dealt in turn: so that each of several workers has one."""
    folder.mkdir(parents=True)
    paths = tuple(folder / f"{number:05d}.tar" for number in range(tars))
    archives = [tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) for path in paths]  # noqa: SIM115
    for number, sample in enumerate(samples):
        assert sample.image is not None
        extension = EXTENSIONS[read_header(sample.image, max_pixels=1 << 62).format]
        for name, data in ((extension, sample.image), ("txt", "".join(sample.captions[:1]).encode())):
            info = tarfile.TarInfo(f"{sample.key}.{name}")
            info.size = len(data)
            archives[number % tars].addfile(info, io.BytesIO(data))
    for archive in archives:
        archive.close()
    return paths
