"""Files compressed with zstd, unpacked into a temporary file without a name: it is gone when it is closed, and when the
process ends in whatever way."""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path
from typing import IO

from rae_scale.state.format import READ_BYTES, CheckpointError

ZSTD_SUFFIXES = (".zst", ".zstd")
LONGEST_HEADER = 18  # of a frame
LARGEST_WINDOW = 1 << 31  # of what zstd --long writes


def unpack(path: Path) -> IO[bytes]:
    """The contents of the zstd file `path`, in $TMPDIR.

    Raises:
        CheckpointError: the file is damaged or cut off, or does not fit; says how much room it needs.
    """
    import zstandard

    folder = Path(tempfile.gettempdir())
    with path.open("rb") as packed:
        try:
            size = zstandard.frame_content_size(packed.read(LONGEST_HEADER))
        except zstandard.ZstdError:
            size = -1
        packed.seek(0)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise no_room(path, folder, f"{size / 1e9:,.1f} GB", free)
        unpacked = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the caller closes it)
        try:
            copy(path, packed, unpacked)
        except OSError as error:
            unpacked.close()
            if error.errno != errno.ENOSPC:
                raise
            raise no_room(path, folder, f"more than {free / 1e9:,.1f} GB", free) from None
        except BaseException:
            unpacked.close()
            raise
    return unpacked


def no_room(path: Path, folder: Path, needs: str, free: int) -> CheckpointError:
    return CheckpointError(
        f"{path} unpacked needs {needs}, and {folder} has {free / 1e9:,.1f} GB left; set TMPDIR to a folder with more "
        f"room, or unpack it yourself: zstd -d {path}"
    )


def copy(path: Path, packed: IO[bytes], unpacked: IO[bytes]) -> None:
    """Unpack all frames of a file. The library's own readers take a file that is cut off for one that ends there."""
    import zstandard

    frame = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
    started = False
    try:
        while block := packed.read(READ_BYTES):
            while block:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
                unpacked.write(frame.decompress(block))
                block, started = frame.unused_data if frame.eof else b"", True
    except zstandard.ZstdError as error:
        raise CheckpointError(f"{path} is damaged: {error}; fetch it again") from None
    if not started or not frame.eof:
        raise CheckpointError(f"{path} is cut off: its last frame has no end; fetch it again")
    unpacked.flush()
