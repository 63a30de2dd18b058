"""Placements against plain slicing of the tensors that they split."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rae_scale.parallel.boxes import Box, whole
from rae_scale.parallel.placement import Placement

CASES = [
    # shape, dim, groups, count
    ((), None, 1, 2),
    ((5,), None, 1, 3),
    ((7,), 0, 1, 3),  # uneven
    ((2,), 0, 1, 3),  # one rank has nothing
    ((6,), 0, 3, 2),  # the bias of a packed layer
    ((5, 3), 0, 1, 2),
    ((3, 5), 1, 1, 2),
    ((12, 2), 0, 3, 2),  # qkv, split by heads
    ((4, 6), 0, 2, 2),
    ((2, 8), 1, 2, 2),  # packed along the last dimension
    ((2, 3, 4), 0, 1, 2),
    ((2, 3, 4), 1, 1, 3),
    ((2, 4, 3), 1, 2, 2),
    ((2, 2, 5), 2, 1, 2),
    ((0, 3), 0, 1, 2),
    ((6, 2), 0, 3, 1),  # one rank: nothing is split
]
NAMES = [f"{shape} dim {dim} groups {groups} over {count}" for shape, dim, groups, count in CASES]
Case = tuple[tuple[int, ...], int | None, int, int]


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(whole(shape).numel, dtype=torch.float32).view(shape)


def local_by_hand(tensor: Tensor, dim: int | None, groups: int, index: int, count: int) -> Tensor:
    """Each packed tensor cut by itself, the pieces laid side by side."""
    if dim is None or count == 1:
        return tensor
    length = tensor.shape[dim] // groups
    first, last = length * index // count, length * (index + 1) // count
    return torch.cat([part[(slice(None),) * dim + (slice(first, last),)] for part in tensor.split(length, dim)], dim)


def placements(case: Case) -> list[Placement]:
    shape, dim, groups, count = case
    return [Placement(shape, dim, groups, index, count) for index in range(count)]


@pytest.mark.parametrize("case", [case for case in CASES if 0 not in case[0]], ids=str)
def test_a_rank_holds_its_part_of_each_packed_tensor(case: Case) -> None:
    tensor = numbered(case[0])
    for placement in placements(case):
        expected = local_by_hand(tensor, case[1], case[2], placement.index, case[3])
        assert placement.local_shape == tuple(expected.shape)
        assert torch.equal(placement.slice(tensor), expected)
        assert placement.is_split == (case[1] is not None and case[3] > 1)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_parts_pair_the_same_elements(case: Case) -> None:
    tensor = numbered(case[0])
    for placement in placements(case):
        local = placement.slice(tensor)
        for here, there in placement.parts:
            assert torch.equal(local[here.slices], tensor[there.slices])


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_views_of_any_range_are_the_logical_tensor_there(case: Case) -> None:
    tensor = numbered(case[0])
    for placement in placements(case):
        flat = placement.slice(tensor).reshape(-1).clone()
        for start, stop in itertools.combinations_with_replacement(range(len(flat) + 1), 2):
            seen: list[float] = []
            for box, view in placement.views(flat[start:stop], start, stop):
                assert tuple(view.shape) == box.shape
                assert torch.equal(view, tensor[box.slices]), (placement, start, stop, box)
                seen += view.flatten().tolist()
            assert sorted(seen) == sorted(flat[start:stop].tolist())


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_ranks_together_hold_each_element_once(case: Case) -> None:
    shape, dim, _, _ = case
    counts = torch.zeros(shape)
    for placement in placements(case) if dim is not None else placements(case)[:1]:
        numel = whole(placement.local_shape).numel
        # As saved by two processes that share this rank's part.
        for start, stop in ((0, numel // 3), (numel // 3, numel)):
            for box, _ in placement.views(torch.zeros(stop - start), start, stop):
                counts[box.slices] += 1
    assert bool((counts == 1).all())


def test_views_share_the_memory() -> None:
    placement = Placement((4, 6), dim=0, groups=2, index=1, count=2)
    flat = torch.zeros(6)  # rows 1 and 3, of which this range is [1, 3:6] and [3, 0:3]
    for box, view in placement.views(flat, 3, 9):
        view.fill_(box.start[0])
    assert flat.tolist() == [1, 1, 1, 3, 3, 3]


def test_a_split_part_has_memory_of_its_own_and_a_whole_one_is_the_tensor() -> None:
    tensor = torch.zeros(4, 2)
    assert Placement((4, 2)).slice(tensor) is tensor
    part = Placement((4, 2), dim=0, index=0, count=2).slice(tensor)
    part.fill_(1)
    assert not tensor.any()


def test_a_whole_tensor_is_one_box() -> None:
    placement = Placement((3, 4))
    assert [box for box, _ in placement.views(torch.zeros(12), 0, 12)] == [whole((3, 4))]
    assert placement.parts == ((Box((0, 0), (3, 4)), Box((0, 0), (3, 4))),)
