from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rae_scale.data.decode import BadImage
from rae_scale.data.dedup import fingerprint, read_fingerprints, write_fingerprints
from rae_scale.data.dedup.perceptual import perceptual_hash
from rae_scale.data.dedup.records import RECORD, count_fingerprints
from rae_scale.data.record import Sample, Turn

MAX = 10**6
QUESTION = (Turn("human", "<image>\nWhat?"), Turn("gpt", "That."))
REQUEST = (Turn("human", "Draw it"), Turn("gpt", "Here you go:\n<image>"))


def record(sample: Sample, position: int = 0, perceptual: bool = False) -> np.void:
    data = fingerprint(sample, position, perceptual=perceptual, max_pixels=MAX)
    assert len(data) == 32
    return np.frombuffer(data, RECORD)[0]


def same_content(one: Sample, other: Sample) -> bool:
    return bool(np.array_equal(record(one)["content"], record(other)["content"]))


def test_the_content_of_a_picture_is_its_bytes() -> None:
    one = Sample("0", b"pixels", ("a circle",))
    assert same_content(one, Sample("1", b"pixels", ("another caption",), (), {"a": 1}))
    assert same_content(one, Sample("2", b"pixels", (), REQUEST))
    assert not same_content(one, Sample("0", b"pixelS", ("a circle",)))


def test_the_content_of_a_question_is_image_and_turns() -> None:
    one = Sample("0", b"pixels", (), QUESTION)
    assert same_content(one, Sample("1", b"pixels", (), QUESTION))
    assert not same_content(one, Sample("0", b"pixels", (), (Turn("human", "<image>\nWhy?"), Turn("gpt", "So."))))
    assert not same_content(one, Sample("0", b"other", (), QUESTION))
    unmentioned = Sample("0", b"pixels", (), (Turn("human", "What?"), Turn("gpt", "That.")))
    assert not same_content(unmentioned, Sample("0", b"pixels", ("x",))), "stands in front of the question"


def test_the_content_of_text_is_its_turns() -> None:
    one = Sample("0", None, (), (Turn("human", "ab"), Turn("gpt", "c")))
    assert same_content(one, Sample("1", None, (), one.turns))
    assert not same_content(one, Sample("0", None, (), (Turn("human", "a"), Turn("gpt", "bc"))))


def test_only_pictures_to_generate_have_a_look(image: Callable[..., bytes]) -> None:
    data = image()
    found = record(Sample("0", data, ("x",)), 7, perceptual=True)
    assert (found["look"], found["has_look"], found["position"]) == (perceptual_hash(data, MAX), 1, 7)
    assert record(Sample("0", data, (), REQUEST), perceptual=True)["has_look"] == 1
    assert record(Sample("0", data, (), QUESTION), perceptual=True)["has_look"] == 0
    assert record(Sample("0", None, (), QUESTION[1:] * 2), perceptual=True)["has_look"] == 0
    assert record(Sample("0", b"not decoded", ("x",)), perceptual=False)["has_look"] == 0
    with pytest.raises(BadImage):
        record(Sample("0", b"no image", ("x",)), perceptual=True)


@pytest.fixture
def records() -> list[bytes]:
    return [fingerprint(Sample(str(n), bytes([n]), ("x",)), 3 * n, perceptual=False, max_pixels=MAX) for n in range(5)]


def test_records_are_written_and_read(tmp_path: Path, records: list[bytes]) -> None:
    path = tmp_path / "unit.fingerprints"
    assert write_fingerprints(path, iter(records)) == 5
    assert read_fingerprints(path).tobytes() == b"".join(records)
    assert read_fingerprints(path)["position"].tolist() == [0, 3, 6, 9, 12]
    assert count_fingerprints(path) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["unit.fingerprints"], "nothing temporary stays"
    write_fingerprints(path, [])
    assert len(read_fingerprints(path)) == count_fingerprints(path) == 0


def test_records_out_of_order_are_refused(tmp_path: Path, records: list[bytes]) -> None:
    with pytest.raises(ValueError, match="must rise"):
        write_fingerprints(tmp_path / "a", [records[1], records[0]])


def test_every_flipped_byte_and_every_length_is_noticed(tmp_path: Path, records: list[bytes]) -> None:
    path = tmp_path / "a"
    write_fingerprints(path, records)
    data = path.read_bytes()
    for position in range(0, len(data), 3):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(ValueError, match=str(path)):
            read_fingerprints(path)
        path.write_bytes(data[:position])
        with pytest.raises(ValueError, match=str(path)):
            read_fingerprints(path)
