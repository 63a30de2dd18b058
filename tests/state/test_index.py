"""Which boxes make up a checkpoint, and reading any other box out of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from rae_scale.parallel.boxes import Box, boxes_of_range, whole
from rae_scale.state import CheckpointError
from rae_scale.state.index import Index, StoredBox, build_index, key, rows_of
from rae_scale.state.read import PieceReader, chunks_of
from rae_scale.state.tensorfile import TensorToWrite, write_tensors

FILE = "file"


def index_of(shape: tuple[int, ...], *boxes: Box) -> Index:
    return build_index({"w": shape}, [("weight", "w", StoredBox(box, FILE)) for box in boxes])


def box(*ranges: tuple[int, int]) -> Box:
    return Box(tuple(first for first, _ in ranges), tuple(last for _, last in ranges))


TOP, BOTTOM = box((0, 1), (0, 3)), box((1, 2), (0, 3))
LEFT, MIDDLE, RIGHT = box((0, 2), (0, 1)), box((0, 2), (1, 2)), box((0, 2), (2, 3))


@pytest.mark.parametrize("boxes", [(whole((2, 3)),), (TOP, BOTTOM), (BOTTOM, TOP), (RIGHT, LEFT, MIDDLE)], ids=str)
def test_boxes_that_cover_a_tensor_once(boxes: tuple[Box, ...]) -> None:
    index = index_of((2, 3), *boxes)
    assert [stored.box for stored in index["w"].pieces["weight"]] == sorted(boxes, key=lambda b: b.start)


@pytest.mark.parametrize(
    ("boxes", "fault"),
    [
        ((), "0 elements are there"),
        ((TOP,), "3 elements are there"),
        ((LEFT, RIGHT), "4 elements are there"),
        ((TOP, TOP), r"\[0:1, 0:3\] and \[0:1, 0:3\] overlap"),
        ((TOP, BOTTOM, MIDDLE), "overlap"),
        # As many elements as there should be, but not the right ones.
        ((TOP, LEFT, box((1, 2), (2, 3))), r"\[0:1, 0:3\] and \[0:2, 0:1\] overlap"),
        ((TOP, box((1, 2), (1, 4))), r"\[1:2, 1:4\] is not a part of it"),
        ((TOP, box((1, 4))), r"\[1:4\] is not a part of it"),
    ],
)
def test_boxes_that_do_not_are_refused(boxes: tuple[Box, ...], fault: str) -> None:
    with pytest.raises(CheckpointError, match=rf"weight of w \[2, 3\]: .* its 6 elements exactly once: .*{fault}"):
        index_of((2, 3), *boxes)


def test_a_number_and_nothing_are_tensors_too() -> None:
    assert index_of((), Box((), ()))["w"].numel == 1
    assert index_of((0, 3))["w"].numel == 0
    with pytest.raises(CheckpointError, match="overlap"):
        index_of((), Box((), ()), Box((), ()))
    with pytest.raises(CheckpointError, match="0 elements are there"):
        index_of(())


@pytest.mark.parametrize("shape", [(4096, 64), (1, 4096, 16), (64, 4096)], ids=str)
def test_of_thousands_of_boxes_few_are_compared(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    dim = shape.index(4096)
    tensor = whole(shape)
    edges = [(*tensor.start[:dim], by, *tensor.start[dim + 1 :]) for by in range(4096)]
    boxes = [Box(edge, (*tensor.stop[:dim], edge[dim] + 1, *tensor.stop[dim + 1 :])) for edge in edges]
    compared = []
    intersect = Box.intersect
    monkeypatch.setattr(Box, "intersect", lambda one, other: compared.append(1) or intersect(one, other))
    index_of(shape, *boxes)
    assert len(compared) <= len(boxes)  # each with each would be eight million
    with pytest.raises(CheckpointError, match="overlap"):
        index_of(shape, *boxes, boxes[2000])


SHAPES = [(), (7,), (4, 5), (2, 3, 3)]


def write_pieces(folder: Path, shape: tuple[int, ...], edges: list[int]) -> tuple[torch.Tensor, Index]:
    """A tensor in one file per range between two of `edges`; ranges are not whole rows, so they are several boxes."""
    values = torch.randn(shape)
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        parts = [
            TensorToWrite(key("weight", "w", b), b.shape, torch.float32, lambda b=b: [values[b.slices]])
            for b in boxes_of_range(shape, start, stop)
        ]
        write_tensors(folder / str(number), parts, {})
    rows = [row for number in range(len(edges) - 1) for row in rows_of(folder / str(number))]
    return values, build_index({"w": shape}, rows)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_box_is_put_together_from_the_pieces_that_overlap_it(shape: tuple[int, ...], tmp_path: Path) -> None:
    numel = whole(shape).numel
    edges = sorted({0, numel // 5, numel // 2, numel // 2 + 1, numel} | {0, numel})
    values, index = write_pieces(tmp_path, shape, [edge for edge in edges if edge <= numel])
    with PieceReader(tmp_path, index) as reader:
        for start in range(numel + 1):
            for stop in range(start + 1, numel + 1):
                for wanted in boxes_of_range(shape, start, stop):
                    assert torch.equal(reader.read("weight", "w", wanted), values[wanted.slices])
        assert torch.equal(reader.read("weight", "w", whole(shape)), values)
        assert reader.read("ema", "w", whole(shape)) is None
        assert reader.read("weight", "other", whole(shape)) is None


def test_what_was_read_outlives_the_file(tmp_path: Path) -> None:
    values, index = write_pieces(tmp_path, (4, 5), [0, 20])
    with PieceReader(tmp_path, index) as reader:
        found = reader.read("weight", "w", whole((4, 5)))
        (tmp_path / "0").write_bytes(bytes((tmp_path / "0").stat().st_size))
    assert torch.equal(found, values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4, 7, 100])
def test_chunks_follow_each_other_and_are_bounded(shape: tuple[int, ...], size: int, tmp_path: Path) -> None:
    numel = whole(shape).numel
    values, index = write_pieces(tmp_path, shape, sorted({0, numel // 3, numel}))
    with PieceReader(tmp_path, index) as reader:
        chunks = list(reader.chunks("weight", "w", whole(shape), chunk_bytes=4 * size))
        assert max(chunk.numel() for chunk in chunks) <= size
        assert torch.equal(torch.cat([chunk.flatten() for chunk in chunks]), values.flatten())
    if shape == (4, 5):
        inner = Box((1, 2), (4, 4))
        parts = list(chunks_of(inner, size))
        assert [e for part in parts for e in values[part.slices].flatten()] == list(values[inner.slices].flatten())
