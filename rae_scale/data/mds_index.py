"""The index of an MDS folder as compact arrays.

An index of 73 million samples has 91,000 entries in 32 MB of JSON. As one tree of dicts it takes half a gigabyte, so
the entries are decoded one after the other and only what reading needs is kept, some 250 bytes each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rae_scale.data.mds_format import UINT32, Column, columns_of

MAX_SHARD_BYTES = 2**32 - 1  # offsets are uint32
MAX_NAME = 1024
SPACE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()
# Relative, without empty parts, "." and "..", and without what ends a name or separates its parts elsewhere.
PART = r"(?!\.\.?(?:/|$))[^/\\\0]+"
SAFE_NAME = re.compile(rf"{PART}(?:/{PART})*")
SHARED = ("version", "format", "compression", "column_names", "column_encodings", "column_sizes")
COMPRESSIONS = ("br", "bz2", "gz", "snappy", "zstd")  # as mosaicml-streaming names them, `zstd:7` with a level
# Of the hashes of a shard the first of these is checked: the fast ones come first. mosaicml writes any of them.
HASHES = (
    "xxh3_128", "xxh128", "xxh3_64", "xxh64", "xxh32", "sha1", "sha256", "sha224", "sha512", "sha384", "blake2b",
    "blake2s", "md5", "sha3_256", "sha3_224", "sha3_384", "sha3_512",
)  # fmt: skip


@dataclass(frozen=True)
class ShardFormat:
    """What the shards of a folder have in common. hash: the algorithm that is checked, None if there is none.
    compression: name without level, such as zstd; None for a shard that is stored as it is read."""

    columns: tuple[Column, ...]
    compression: str | None
    hash: str | None


@dataclass(frozen=True)
class Shard:
    """One shard. name: of its file, relative to the index. bytes: of the shard as it is read. file_bytes: of the file,
    which are fewer if it is compressed. digest: hexadecimal, of the shard as it is read."""

    name: str
    samples: int
    bytes: int
    file_bytes: int
    digest: str
    format: ShardFormat


@dataclass(frozen=True)
class MDSIndex:
    """All shards, in order. samples, bytes, file_bytes: int64 `[shards]`; see Shard."""

    names: list[str]
    digests: list[bytes]
    samples: np.ndarray
    bytes: np.ndarray
    file_bytes: np.ndarray
    format_of: np.ndarray
    formats: list[ShardFormat]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> Shard:
        return Shard(
            self.names[number],
            int(self.samples[number]),
            int(self.bytes[number]),
            int(self.file_bytes[number]),
            self.digests[number].hex(),
            self.formats[self.format_of[number]],
        )


def parse_index(data: bytes, where: str) -> MDSIndex:
    """`data` as an index. Raises ValueError, naming `where`, when it is not a complete one that can be read safely."""
    builder = IndexBuilder()
    try:
        for entry in shard_entries(data.decode("utf-8")):
            builder.add(entry)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{where}: not a complete MDS index ({error!r:.200}); build or copy the folder again"
        ) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return builder.index()


def shard_entries(text: str) -> Iterator[Any]:
    """The elements of the list `shards` of a JSON object, each decoded when it is asked for."""
    scanner = Scanner(text)
    scanner.take("{")
    found = False
    end = "," if scanner.peek() != "}" else scanner.take("}")
    while end == ",":
        key = scanner.value()
        scanner.take(":")
        if key == "shards" and not found:
            found = True
            scanner.take("[")
            end = "," if scanner.peek() != "]" else scanner.take("]")
            while end == ",":
                yield scanner.value()
                end = scanner.take(",]")
        else:
            scanner.value()
        end = scanner.take(",}")
    if scanner.peek() or not found:
        raise scanner.error("no list of shards" if not found else "more than an index")


@dataclass
class Scanner:
    text: str
    at: int = 0

    def peek(self) -> str:
        self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
        return self.text[self.at : self.at + 1]

    def take(self, expected: str) -> str:
        """The next character, which has to be one of these."""
        found = self.peek()
        if not found or found not in expected:
            raise self.error(f"{' or '.join(expected)} expected")
        self.at += 1
        return found

    def value(self) -> Any:
        self.peek()
        value, self.at = DECODER.raw_decode(self.text, self.at)
        return value

    def error(self, message: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self.text, self.at)


class IndexBuilder:
    """Checks entries and takes from them what reading needs."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.digests: list[bytes] = []
        self.numbers: list[tuple[int, int, int, int]] = []
        self.formats: dict[ShardFormat, int] = {}
        self.known: dict[str, tuple[int, ShardFormat]] = {}  # by the part of an entry that shards share, as text

    def add(self, entry: dict[str, Any]) -> None:
        raw = entry["raw_data"]
        hashes = raw["hashes"]
        shared = repr((*map(entry.__getitem__, SHARED), *hashes))
        if shared not in self.known:
            form = format_of(entry)
            self.known[shared] = self.formats.setdefault(form, len(self.formats)), form
        number, form = self.known[shared]
        stored = raw if form.compression is None else entry["zip_data"]
        name = stored["basename"]
        if not SAFE_NAME.fullmatch(name) or len(name) > MAX_NAME:
            raise ValueError(f"shard name {name!r:.100} leaves the folder or is no name; build the index again")
        samples = whole(entry["samples"], name, "samples", 0, MAX_SHARD_BYTES)
        # A shard has at least its count and its offsets.
        size = whole(raw["bytes"], name, "bytes", UINT32.size * (samples + 2), MAX_SHARD_BYTES)
        file_size = size if stored is raw else whole(stored["bytes"], name, "bytes", 1, MAX_SHARD_BYTES)
        try:
            digest = b"" if form.hash is None else bytes.fromhex(hashes[form.hash])
        except ValueError:
            raise ValueError(
                f"{name}: {form.hash} {hashes[form.hash]!r:.50} is no hash; build the index again"
            ) from None
        self.names.append(name)
        self.digests.append(digest)
        self.numbers.append((samples, size, file_size, number))

    def index(self) -> MDSIndex:
        if len(set(self.names)) != len(self.names):
            seen: set[str] = set()
            twice = next(name for name in self.names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise ValueError(f"shard {twice!r} is listed twice; its samples would count twice: build the index again")
        samples, size, file_size, form = np.array(self.numbers, dtype=np.int64).reshape(-1, 4).T.copy()
        return MDSIndex(self.names, self.digests, samples, size, file_size, form, list(self.formats))


def format_of(entry: dict[str, Any]) -> ShardFormat:
    name = entry["raw_data"]["basename"]
    if (entry["version"], entry["format"]) != (2, "mds"):
        raise ValueError(f"{name}: format {entry['format']!r} version {entry['version']}; only MDS version 2 is read")
    compression = entry["compression"] and entry["compression"].partition(":")[0]
    if compression not in (None, *COMPRESSIONS):
        raise ValueError(f"{name}: compression {compression!r}; {', '.join(COMPRESSIONS)} are read")
    try:
        columns = columns_of(entry)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    known = (algorithm for algorithm in HASHES if algorithm in entry["raw_data"]["hashes"])
    return ShardFormat(columns, compression, next(known, None))


def whole(value: object, name: str, what: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: {what}={value!r:.50} is not a whole number of {least} to {most}; build it again")
    return value
