"""Boxes against the tensors that they stand for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from rae_scale.parallel.boxes import Box, boxes_of_range, even_split, whole

SHAPES = [(), (1,), (5,), (0,), (3, 4), (1, 6), (4, 1), (0, 3), (3, 0), (2, 3, 4), (1, 1, 5), (2, 1, 3), (2, 2, 2, 2)]


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape)).view(shape)


def all_boxes(shape: tuple[int, ...]) -> list[Box]:
    """Every box in a tensor, empty ones included."""
    ranges = [list(itertools.combinations_with_replacement(range(length + 1), 2)) for length in shape]
    return [Box(tuple(r[0] for r in pairs), tuple(r[1] for r in pairs)) for pairs in itertools.product(*ranges)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_boxes_of_a_range_are_its_elements_in_order(shape: tuple[int, ...]) -> None:
    tensor = numbered(shape)
    for start, stop in itertools.combinations_with_replacement(range(tensor.numel() + 1), 2):
        boxes = list(boxes_of_range(shape, start, stop))
        elements = [element for box in boxes for element in tensor[box.slices].flatten().tolist()]
        assert elements == list(range(start, stop)), (start, stop, boxes)
        assert all(box.numel > 0 for box in boxes)
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_whole_is_one_box(shape: tuple[int, ...]) -> None:
    box = whole(shape)
    assert (box.shape, box.numel) == (shape, math.prod(shape))
    assert torch.equal(numbered(shape)[box.slices], numbered(shape))
    assert list(boxes_of_range(shape, 0, box.numel)) == ([box] if box.numel else [])


@pytest.mark.parametrize("shape", [(), (6,), (3, 4), (2, 3, 2)], ids=str)
def test_what_two_boxes_share(shape: tuple[int, ...]) -> None:
    tensor = numbered(shape)
    boxes = all_boxes(shape)
    for one, other in itertools.product(boxes, boxes[:: max(1, len(boxes) // 40)]):
        shared = set(tensor[one.slices].flatten().tolist()) & set(tensor[other.slices].flatten().tolist())
        common = one.intersect(other)
        assert common == other.intersect(one)
        if common is None:
            assert not shared
            continue
        assert set(tensor[common.slices].flatten().tolist()) == shared
        # The same elements, found again in a tensor that holds `one` only.
        assert torch.equal(tensor[one.slices][common.relative_to(one).slices], tensor[common.slices])


def test_a_box_knows_its_size_and_moves() -> None:
    box = Box((1, 0, 2), (3, 4, 3))
    assert (box.shape, box.numel) == ((2, 4, 1), 8)
    outer = Box((10, 20, 30), (19, 29, 39))
    assert box.placed_in(outer) == Box((11, 20, 32), (13, 24, 33))
    assert box.placed_in(outer).relative_to(outer) == box


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize(("start", "stop"), [(3, 8), (0, 14), (5, 5)])
def test_parts_follow_each_other_and_differ_by_one_at_most(start: int, stop: int, count: int) -> None:
    parts = [even_split(start, stop, index, count) for index in range(count)]
    assert parts[0][0] == start
    assert parts[-1][1] == stop
    assert all(left[1] == right[0] for left, right in itertools.pairwise(parts))
    lengths = [last - first for first, last in parts]
    assert max(lengths) - min(lengths) <= 1
