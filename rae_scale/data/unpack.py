"""Compressed archives, unpacked to a temporary file: their members can then be read in any order, like a plain tar's.

The file has no name, so that nothing is left behind even by a process that is killed. It lies in the system's temporary
folder (`TMPDIR`), which needs room for one unpacked archive per process. Memory holds one block.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

from isal import isal_zlib  # the zlib of the standard library, several times as fast

BLOCK_BYTES = 2**16
MAX_UNPACKED_BYTES = 2**40
# Deflate packs zeros 1032 to 1; archives of images hardly shrink, of text by 3 to 10.
MAX_RATIO = 200
RATIO_FREE_BYTES = 64 * 2**20


def is_packed(path: Path) -> bool:
    return path.suffix.lower() in (".gz", ".tgz")


def unpack(path: Path) -> tuple[IO[bytes], str | None]:
    """The content of a gzip file as an open temporary file, and what is wrong with it if it does not end well.

    What comes before the damage is kept, up to the block in which it shows. Raises OSError when the archive cannot be
    opened or the temporary folder is full.
    """
    unpacked = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  the caller's
    try:
        with open(path, "rb") as packed:
            return unpacked, copy(packed, unpacked)
    except BaseException:
        unpacked.close()
        raise


def copy(packed: IO[bytes], unpacked: IO[bytes]) -> str | None:
    """Unpack all gzip members of a file. Returns what is wrong with it."""
    size = 0
    member = new_member()
    data = packed.read(BLOCK_BYTES)
    while True:
        try:
            block = member.decompress(data, BLOCK_BYTES)
        except isal_zlib.IsalError as error:  # type: ignore[misc]  # its stub declares an instance
            return f"cannot be unpacked to its end, corrupt or no gzip file: {error}"
        size += len(block)
        if size > MAX_UNPACKED_BYTES:
            return f"unpacks to more than {MAX_UNPACKED_BYTES} bytes; split the archive"
        if size > max(RATIO_FREE_BYTES, MAX_RATIO * packed.tell()):
            return f"unpacks to more than {MAX_RATIO} times its size, which no archive of samples does"
        unpacked.write(block)
        if member.eof:
            data = member.unused_data.lstrip(b"\0") or packed.read(BLOCK_BYTES).lstrip(b"\0")
            if not data:
                return None
            member = new_member()
        elif data or block:  # the decompressor may hold output back after its input has ended
            data = member.unconsumed_tail or packed.read(BLOCK_BYTES)
        else:
            return "cannot be unpacked to its end: truncated, or empty"


def new_member() -> isal_zlib.Decompress:
    return isal_zlib.decompressobj(wbits=31)  # 31: with the header and the checksum of gzip
