"""The MDS shard format, version 2 (mosaicml-streaming), for the columns of a sample.

A shard is: the number of samples n (uint32), n + 1 absolute offsets (uint32), a JSON header, the samples. A sample is:
the byte lengths of its columns (uint32 each, columns of fixed size excepted), then their bytes, columns sorted by name.
`index.json` beside the shards lists them with sizes and hashes. All integers are little endian.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rae_scale.data.record import BadSample, Sample
from rae_scale.data.text import parse_turns

T = TypeVar("T")

INDEX_NAME = "index.json"
HASH = "xxh3_128"
UINT32 = struct.Struct("<I")

# The columns that the writer writes, sorted by name as the format demands.
WRITTEN = {
    "caption_weights": "json",
    "captions": "json",
    "image": "bytes",
    "key": "str",
    "metadata": "json",
    "turns": "json",
}
LENGTHS = struct.Struct(f"<{len(WRITTEN)}I")
# The columns that the reader takes from any MDS folder, with the encodings that hold what it needs. Others are skipped
# without being decoded: an encoding such as `pkl` would run code.
READABLE = {
    "caption": ("str",),
    "caption_weights": ("json",),
    "captions": ("json",),
    "image": ("bytes", "jpeg", "png"),
    "key": ("str",),
    "metadata": ("json",),
    "turns": ("json",),
}


@dataclass(frozen=True)
class Column:
    name: str
    encoding: str
    size: int | None  # bytes, None when it differs from sample to sample


def encode_sample(sample: Sample) -> bytes:
    """A sample as a row. An absent image is zero bytes; turns keep the official form `[{"from", "value"}]`."""
    return b"".join(row_parts(sample))


def row_parts(sample: Sample) -> list[bytes]:
    """The row in pieces, of which the image is the sample's own bytes."""
    values = {
        "caption_weights": json_bytes(sample.caption_weights),
        "captions": json_bytes(sample.captions),
        "image": sample.image or b"",
        "key": sample.key.encode("utf-8"),
        "metadata": json_bytes(sample.metadata),
        "turns": json_bytes([{"from": turn.role, "value": turn.value} for turn in sample.turns]),
    }
    parts = [values[name] for name in WRITTEN]
    return [LENGTHS.pack(*map(len, parts)), *parts]


def json_bytes(value: Collection[object]) -> bytes:
    if not value:  # most samples have no turns, and no weights
        return b"{}" if isinstance(value, dict) else b"[]"
    return json.dumps(value).encode("ascii")


def decode_sample(row: bytes, columns: Sequence[Column], name: str) -> Sample:
    """The sample in a row. Raises BadSample, naming `name`, when its bytes do not fit together."""
    try:
        values = {
            column.name: decode_value(column.encoding, data)
            for column, data in zip(columns, split_row(row, columns), strict=True)
            if column.name in READABLE
        }
        if "caption" in values:
            values["captions"] = [values["caption"]]
        turns = values.get("turns")
        return Sample(
            key=values.get("key", name),
            image=values.get("image") or None,
            captions=tuple(expect(list, values.get("captions", []))),
            turns=parse_turns(turns, name) if turns else (),
            metadata=expect(dict, values.get("metadata", {})),
            caption_weights=tuple(expect(list, values.get("caption_weights", []))),
        )
    except (struct.error, TypeError, ValueError) as error:
        raise BadSample("corrupt row", f"{name}: {error}") from None


def expect(kind: type[T], value: object) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{kind.__name__} expected, found {value!r:.50}")
    return value


def split_row(row: bytes, columns: Sequence[Column]) -> list[bytes]:
    count = sum(column.size is None for column in columns)
    lengths = iter(struct.unpack_from(f"<{count}I", row))
    start = UINT32.size * count
    parts = []
    for column in columns:
        end = start + (next(lengths) if column.size is None else column.size)
        parts.append(row[start:end])
        start = end
    if start != len(row):
        raise ValueError(f"column sizes add up to {start} of {len(row)} bytes")
    return parts


def decode_value(encoding: str, data: bytes) -> Any:
    if encoding == "str":
        return data.decode("utf-8")
    # As text: of bytes, json.loads guesses the encoding first, which takes as long again for values as short as these.
    return json.loads(str(data, "utf-8")) if encoding == "json" else data


def columns_of(shard: Mapping[str, Any]) -> tuple[Column, ...]:
    """The columns of a shard's entry in the index. Raises ValueError when no sample can be made of them."""
    columns = tuple(
        Column(*values)
        for values in zip(shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True)
    )
    for column in columns:
        if not isinstance(column.name, str) or not (
            column.size is None or (type(column.size) is int and column.size >= 0)
        ):
            raise ValueError(f"column {column.name!r} of {column.size!r} bytes; build the folder again")
        allowed = READABLE.get(column.name, (column.encoding,))
        if column.encoding not in allowed:
            raise ValueError(
                f"column {column.name!r} has encoding {column.encoding!r}; write it as {' or '.join(allowed)}"
            )
    names = {column.name for column in columns}
    if not names & {"caption", "captions", "turns"}:
        raise ValueError(f"no text in columns {sorted(names)}; call it caption (str), captions (json) or turns (json)")
    return columns
