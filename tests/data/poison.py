"""Samples that some day are in every corpus: each is either refused with a reason, or usable with a stated meaning.

Run as a program it reads a tar of them in both ways, and prints by how many bytes the process has grown at most.
"""

from __future__ import annotations

import io
import struct
import sys
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rae_scale.data.decode import DEFAULT_MAX_PIXELS, decode_image
from rae_scale.data.prepare import PrepareOptions, prepare_sample
from rae_scale.data.record import BadSample
from rae_scale.data.sources import Source

UNDECODABLE, TOO_LARGE = "undecodable image", "image too large"
RED, BLUE = (254, 0, 0), (0, 0, 254)
SIZE = (32, 16)


class Poison(NamedTuple):
    """reason: with which it is refused; None if it can be used. colour: of its left half then, when decoded."""

    data: bytes
    reason: str | None = None
    colour: tuple[int, int, int] = RED
    extension: str = "jpg"


def picture(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, BLUE)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    return image.convert(mode)


def save(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(chunks: bytes) -> bytes:
    """A good PNG with more chunks behind its header."""
    data = save(picture(), "PNG")
    return data[:33] + chunks + data[33:]


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def zeros(megabytes: int) -> bytes:
    """So many, compressed. Fast: a flush makes the blocks of each megabyte alike."""
    packer = zlib.compressobj(9)
    start = packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + block * megabytes + packer.flush()


def jpeg_of_claimed_size(data: bytes, width: int, height: int) -> bytes:
    """The JPEG `data` with another size in its header."""
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">2H", height, width) + data[start + 4 :]


def webp_of_claimed_size(width: int, height: int) -> bytes:
    sizes = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + sizes
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(picture(), "JPEG", exif=exif, quality=95, subsampling=0)


def palette_with_alpha() -> bytes:
    image = picture().quantize(2)
    return save(image, "PNG", transparency=image.getpixel((0, 0)))


def poisoned_images() -> dict[str, Poison]:
    jpeg = save(picture(), "JPEG", quality=95, subsampling=0)
    frames = {"save_all": True, "append_images": [picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]}
    deep = np.zeros((16, 32), np.uint16)
    deep[:, 16:] = 65_535
    found = {
        "truncated": Poison(jpeg[: len(jpeg) // 2], UNDECODABLE),
        "cut-header": Poison(jpeg[:30], UNDECODABLE),
        "no-jpeg-end": Poison(jpeg[:-2] + b"\xff", UNDECODABLE),
        "flipped-bit": Poison(jpeg[:158] + bytes([jpeg[158] ^ 64]) + jpeg[159:], UNDECODABLE),
        "zeros": Poison(bytes(1000), UNDECODABLE),
        "one-byte": Poison(b"\xff", UNDECODABLE),
        "cmyk": Poison(save(picture("CMYK"), "JPEG", quality=95, subsampling=0)),
        "grey-16-bit": Poison(save(Image.fromarray(deep), "PNG"), colour=(0, 0, 0), extension="png"),
        "palette-alpha": Poison(palette_with_alpha(), colour=(255, 255, 255), extension="png"),
        "animated-webp": Poison(save(picture(), "WEBP", lossless=True, **frames), extension="webp"),
        "animated-png": Poison(save(picture(), "PNG", **frames), extension="png"),
        "one-pixel": Poison(save(picture(size=(1, 1)), "PNG"), colour=BLUE, extension="png"),
        "bomb-jpeg": Poison(jpeg_of_claimed_size(jpeg, 65500, 65500), TOO_LARGE),
        "bomb-png": Poison(png_header(65500, 65500), TOO_LARGE, extension="png"),
        "bomb-line": Poison(png_header(2**31 - 1, 1), TOO_LARGE, extension="png"),
        "bomb-webp": Poison(webp_of_claimed_size(16383, 16383), TOO_LARGE, extension="webp"),
        "huge-profile": Poison(save(picture(), "JPEG", quality=95, subsampling=0, icc_profile=bytes(10_000_000))),
        "huge-exif": Poison(png_with(chunk(b"eXIf", bytes(20_000_000))), extension="png"),
        "bomb-profile": Poison(png_with(chunk(b"iCCP", b"x\0\0" + zeros(400))), UNDECODABLE, extension="png"),
        "bomb-text": Poison(png_with(chunk(b"zTXt", b"x\0\0" + zeros(400))), UNDECODABLE, extension="png"),
        "png-named-jpg": Poison(save(picture(), "PNG")),
        "gif-named-jpg": Poison(save(picture(), "GIF"), UNDECODABLE),
        "page-named-png": Poison(b"<!DOCTYPE html><title>404</title>", UNDECODABLE, extension="png"),
        **{f"exif-{number}": Poison(oriented(number)) for number in range(10)},
    }
    return found


def poisoned_texts() -> dict[str, tuple[str, bytes, str | None]]:
    """Extension and content of what comes with a good picture, and the reason; None where it is usable."""
    return {
        "empty": ("txt", b"", "empty text"),
        "blank": ("txt", b" \n\t", "empty text"),
        "megabyte": ("txt", b"a " * 500_000, "text too long"),
        "not-utf-8": ("txt", b"caf\xe9", "invalid text"),
        "nul": ("txt", b"a\0b", "invalid text"),
        "byte-order-mark": ("txt", b"\xef\xbb\xbfa boat", None),
        "right-to-left": ("txt", "\u202eboat".encode(), None),
        "missing-key": ("json", b'{"url": "x"}', "no caption"),
        "null-caption": ("json", b'{"caption": null}', "no caption"),
        "cut-json": ("json", b'{"caption": "a b', "bad json"),
        "deep-json": ("json", b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad json"),
        "half-a-pair": ("json", b'{"caption": "\\ud800"}', "invalid text"),
    }


def write_tar(path: Path) -> Path:
    """All of them as a corpus would hold them: image and caption."""
    with tarfile.open(path, "w") as archive:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        for name, poison in poisoned_images().items():
            add(f"image-{name}.{poison.extension}", poison.data)
            add(f"image-{name}.txt", b"a picture")
        add("image-nothing.jpg", b"")
        add("image-nothing.txt", b"a picture")
        for name, (extension, data, _) in poisoned_texts().items():
            add(f"text-{name}.jpg", save(picture(), "JPEG"))
            add(f"text-{name}.{extension}", data)
    return path


def build_verdicts(path: Path) -> dict[str, str | None]:
    """Of each sample in the tar: why a build refuses it, or None."""
    found: dict[str, str | None] = {}
    for item in Source(path):
        try:
            if item.sample is None:
                raise item.problem or AssertionError(item.key)
            prepare_sample(item.sample, PrepareOptions())
            found[item.key] = None
        except BadSample as problem:
            found[item.key] = problem.reason
    return found


def peak() -> int:
    """Most bytes that this process has held. Not getrusage's: that begins with what the parent held when it forked."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main(path: Path) -> None:
    decode_image(save(picture(), "JPEG"), 1000)
    before = peak()
    build_verdicts(path)
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            with suppress(BadSample):
                decode_image(file.read(), DEFAULT_MAX_PIXELS)
    print(peak() - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
