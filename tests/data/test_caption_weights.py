from __future__ import annotations

import json
from pathlib import Path

import pytest

from rae_scale.data import mds_format
from rae_scale.data.mds_format import Column, decode_sample, encode_sample
from rae_scale.data.record import BadSample, Sample

COLUMNS = [Column(name, encoding, None) for name, encoding in mds_format.WRITTEN.items()]


def test_weights_are_written_and_read() -> None:
    sample = Sample("0", b"x", ("long", "short"), (), {}, (0.25, 3.0))
    assert decode_sample(encode_sample(sample), COLUMNS, "0") == sample
    assert list(mds_format.WRITTEN) == sorted(mds_format.WRITTEN), "MDS wants its columns sorted by name"


def test_rows_without_the_column_have_no_weights() -> None:
    columns = [column for column in COLUMNS if column.name != "caption_weights"]
    parts = {"captions": b'["a", "b"]', "image": b"x", "key": b"0", "metadata": b"{}", "turns": b"[]"}
    row = b"".join(len(parts[c.name]).to_bytes(4, "little") for c in columns) + b"".join(parts[c.name] for c in columns)
    assert decode_sample(row, columns, "0") == Sample("0", b"x", ("a", "b"))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((1.0,), "1 caption_weights for 2 captions"),
        ((1.0, -1.0), "finite numbers from 0 on"),
        ((1.0, float("inf")), "finite numbers from 0 on"),
        ((1.0, float("nan")), "finite numbers from 0 on"),
        ((0.0, 0.0), "sum above 0"),
        ((1e308, 1e308), "finite sum"),
        ((True, 1.0), "finite numbers"),
    ],
)
def test_weights_that_nothing_can_be_drawn_by_are_refused(weights: tuple[float, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sample("0", b"x", ("a", "b"), (), {}, weights)


@pytest.mark.parametrize("weights", [b"[1]", b'["a", 1]', b"{}", b"[1e999, 1]", b"[-1, 1]"])
def test_a_row_with_wrong_weights_is_a_bad_sample(weights: bytes, tmp_path: Path) -> None:
    good = json.dumps([1.0, 1.0]).encode()
    row = encode_sample(Sample("0", b"x", ("a", "b"), (), {}, (1.0, 1.0)))
    row = row.replace(len(good).to_bytes(4, "little"), len(weights).to_bytes(4, "little"), 1).replace(good, weights)
    with pytest.raises(BadSample, match="corrupt row"):
        decode_sample(row, COLUMNS, "0")
