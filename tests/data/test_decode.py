from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from rae_scale.config.schema import DataConfig
from rae_scale.data.decode import DEFAULT_MAX_PIXELS, BadImage, decode_image, read_header

LIMIT = 10_000


def save(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def encode_other(format: str) -> bytes:
    return save(Image.new("RGB", (4, 4)), format)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_of_claimed_size(data: bytes, width: int, height: int) -> bytes:
    """The JPEG `data` with another size in its header."""
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">2H", height, width) + data[start + 4 :]


def webp_of_claimed_size(width: int, height: int) -> bytes:
    sizes = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + sizes
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_rgb(image, format: str) -> None:
    data = image(format, width=40, height=30)
    pixels = decode_image(data, LIMIT)
    assert pixels.shape == (30, 40, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable  # a tensor can share it
    exact = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(pixels - exact).max() <= 1
    header = read_header(data, LIMIT)
    assert (header.format, header.width, header.height) == (format, 40, 30)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_become_rgb(image, mode: str) -> None:
    data = image("JPEG", mode=mode)
    exact = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data, LIMIT) - exact).max() <= 2


def test_progressive_jpeg() -> None:
    grey = Image.new("RGB", (32, 32), (90, 120, 150))
    assert np.abs(decode_image(save(grey, "JPEG", progressive=True), LIMIT) - [90, 120, 150.0]).max() <= 2


def test_a_jpeg_with_unusual_subsampling_falls_back_to_pillow(image) -> None:
    data = bytearray(image("JPEG", width=64, height=64))
    factors = data.index(b"\xff\xc0") + 11
    assert data[factors] == 0x22
    data[factors] = 0x31  # 3 x 1: legal, unknown to the turbojpeg interface
    assert decode_image(bytes(data), LIMIT).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("at_least", "size"), [(400, (300, 200)), (101, (300, 200)), (100, (150, 100)), (50, (75, 50)), (1, (38, 25))]
)
def test_a_jpeg_is_decoded_no_smaller_than_asked_nor_enlarged(image, at_least: int, size: tuple[int, int]) -> None:
    pixels = decode_image(image("JPEG", width=300, height=200), 60_000, at_least)
    assert pixels.shape == (size[1], size[0], 3)


def test_scaled_decoding_checks_as_much(image) -> None:
    data = image("JPEG", width=64, height=64)
    with pytest.raises(BadImage, match="max_pixels"):
        decode_image(data, 4000, at_least=8)
    with pytest.raises(BadImage, match="undecodable image"):
        decode_image(data[: len(data) // 2], LIMIT, at_least=8)
    assert decode_image(image("PNG", width=64, height=64), LIMIT, at_least=8).shape == (64, 64, 3)


def test_transparency_is_flattened_on_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    palette = rgba.convert("RGB").quantize(4)
    for data in (save(rgba, "PNG"), save(rgba, "WEBP", lossless=True)):
        pixels = decode_image(data, LIMIT)
        assert pixels[0, 0].tolist() == [255, 0, 0]
        assert pixels[1:].min() == 255
    transparent = decode_image(save(palette, "PNG", transparency=palette.getpixel((0, 0))), LIMIT)
    assert transparent.min() == 255


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = decode_image(save(Image.fromarray(ramp), "PNG"), LIMIT)
    assert np.abs(pixels.reshape(-1, 3) - np.arange(256)[:, None]).max() <= 1


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    data = save(Image.new("RGB", (32, 16)), "JPEG", exif=exif)
    assert decode_image(data, LIMIT).shape == (16, 32, 3)


def test_one_pixel_and_the_first_frame_of_an_animation() -> None:
    assert decode_image(save(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), LIMIT).tolist() == [[[1, 2, 3]]]
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("WEBP", "PNG"):
        data = save(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        assert decode_image(data, LIMIT)[0, 0].tolist() == [255, 0, 0]


def test_header_bombs_are_refused_before_memory_is_taken(image) -> None:
    small = image("JPEG")
    bombs = [
        jpeg_of_claimed_size(small, 65500, 65500),
        png_header(65500, 65500),
        png_header(2**31 - 1, 1),
        webp_of_claimed_size(16383, 16383),
    ]
    tracemalloc.start()
    for data in bombs:
        for read in (decode_image, read_header):
            with pytest.raises(BadImage) as caught:
                read(data, 89_478_485)
            assert caught.value.reason == "image too large"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_the_default_limit_is_the_configs() -> None:
    assert DataConfig().max_pixels == DEFAULT_MAX_PIXELS


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_limit_counts_pixels(image, format: str) -> None:
    data = image(format, width=20, height=10)
    assert decode_image(data, 200).shape == (10, 20, 3)
    with pytest.raises(BadImage, match="20 x 10 pixels are more than max_pixels = 199"):
        decode_image(data, 199)


@pytest.mark.parametrize(("format", "trailer"), [("JPEG", 2), ("PNG", 12 + 4 + 4), ("WEBP", 1)])
def test_every_truncation_is_refused(image, format: str, trailer: int) -> None:
    """Up to the end of the picture's own data; what follows is an end mark and checksums."""
    data = image(format)
    for size in range(0, len(data) - trailer, 7):
        with pytest.raises(BadImage):
            decode_image(data[:size], LIMIT)


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8", *(encode_other(name) for name in ("GIF", "TIFF", "BMP"))])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(BadImage) as caught:
        decode_image(data, LIMIT)
    assert caught.value.reason == "undecodable image"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_flipped_bytes_end_in_pixels_or_in_bad_image(image, format: str) -> None:
    generator = random.Random(0)
    original = image(format)
    for _ in range(300):
        data = bytearray(original)
        for _ in range(generator.randint(1, 8)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            pixels = decode_image(bytes(data), LIMIT)
        except BadImage:
            continue
        assert pixels.ndim == 3 and pixels.shape[2] == 3
