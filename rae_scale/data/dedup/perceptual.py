"""A 64-bit hash of how an image looks: near-equal images differ in few bits.

The DCT hash of pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2):
the luminance at 32 x 32, its DCT, the 8 x 8 lowest frequencies without the first row and column, and one bit for each
that is above their median. All arithmetic is on integers, so that the hash is the same on every machine.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import simplejpeg

from rae_scale.data.decode import decode_image, read_header

SIZE = 32
DECODED = 2 * SIZE  # to which side at least a JPEG is decoded; with less, its size shows in the hash
LOW = slice(1, 9)
SCALE = 2**12  # of the DCT's cosines as integers; the sums stay below 2**45
LUMA = np.array([299, 587, 114])  # thousandths, ITU-R BT.601 as in JPEG


def dct_rows() -> np.ndarray:
    """The eight lowest rows of the 32-point DCT-II but the constant one, int64 [8, 32]."""
    k = np.arange(SIZE)[LOW, None]
    return np.rint(SCALE * np.cos(np.pi * k * (2 * np.arange(SIZE) + 1) / (2 * SIZE))).astype(np.int64)


DCT = dct_rows()


def perceptual_hash(data: bytes, max_pixels: int) -> int:
    """The hash of an encoded image, 0 to 2**64 - 1; 0 for an image of one colour. Raises BadImage."""
    small = shrink_luma(read_luma(data, max_pixels))
    coefficients = (DCT @ small @ DCT.T).ravel()
    middle = np.partition(coefficients, (31, 32))[31:33]
    # Twice each value against the sum of the middle two: the median of an even count, without a fraction.
    bits = 2 * coefficients > middle.sum()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def read_luma(data: bytes, max_pixels: int) -> np.ndarray:
    """The luminance, uint8 `[H, W]`. A JPEG is decoded only as large as needed, in steps of an eighth."""
    if read_header(data, max_pixels).format == "JPEG":
        try:
            return simplejpeg.decode_jpeg(data, "GRAY", min_height=DECODED, min_width=DECODED)[..., 0]
        except ValueError:
            pass  # a rare kind of JPEG, or a broken one: the full decoder tells them apart
    return (decode_image(data, max_pixels) @ LUMA // 1000).astype(np.uint8)


def shrink_luma(luma: np.ndarray) -> np.ndarray:
    """`[H, W]` to int64 `[32, 32]` by the mean of the area under each cell, in 256ths."""
    height, width = luma.shape
    # Exact, in whatever order the products are added: whole numbers below 2**53.
    sums = overlaps(height) @ luma.astype(np.float64) @ overlaps(width).T
    return 256 * sums.astype(np.int64) // (height * width)


@lru_cache(maxsize=256)
def overlaps(size: int) -> np.ndarray:
    """How much of each of `size` pixels lies under each of the 32 cells, in 32nds of a pixel, float64 [32, size]."""
    cells, pixels = np.arange(SIZE)[:, None], np.arange(size)
    begin = np.maximum(cells * size, pixels * SIZE)
    end = np.minimum((cells + 1) * size, (pixels + 1) * SIZE)
    return np.maximum(end - begin, 0).astype(np.float64)
