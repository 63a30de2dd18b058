from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rae_scale.engines.gradients import clip_factor, group_norms, scale, total_norm
from rae_scale.engines.optimizer import GroupKey
from rae_scale.engines.shards import Shard, add_ema, exchange_ema, update_ema
from rae_scale.parallel import Mesh
from rae_scale.parallel.boxes import Box
from rae_scale.parallel.placement import Placement

CPU = torch.device("cpu")


def shard(group: str | None = "dit", placement: Placement = Placement((4, 3))) -> Shard:  # noqa: B008
    return Shard("w", placement, 5, 11, group, (7, 9), {"weight": torch.arange(5.0, 11.0)})


def test_a_shard_gives_away_what_it_owns() -> None:
    (piece,) = shard().pieces()
    assert (piece.kind, piece.shape, piece.box) == ("weight", (4, 3), Box((2, 1), (3, 3)))
    assert piece.tensor.tolist() == [[7, 8]]


def test_pieces_of_a_split_parameter_are_boxes_of_the_whole_one() -> None:
    # Of a [4, 6] tensor this rank has columns 3 to 6; its elements 5 to 11 are [1, 5], row 2, and [3, 3:5].
    split = shard(placement=Placement((4, 6), dim=1, index=1, count=2))
    split.owned = (5, 11)
    assert [(piece.shape, piece.box, piece.tensor.tolist()) for piece in split.pieces()] == [
        ((4, 6), Box((1, 5), (2, 6)), [[5]]),
        ((4, 6), Box((2, 3), (3, 6)), [[6, 7, 8]]),
        ((4, 6), Box((3, 3), (4, 5)), [[9, 10]]),
    ]
    for box, view in split.views("weight"):
        view.copy_(torch.full(box.shape, float(box.start[0])))
    assert split.weight.tolist() == [1, 2, 2, 2, 3, 3]


def test_a_shard_that_owns_nothing_gives_nothing() -> None:
    empty = shard()
    empty.owned = (8, 8)
    assert list(empty.pieces()) == []


def test_moving_average_and_its_exchange() -> None:
    trained, frozen = shard(), shard(group=None)
    add_ema([trained, frozen])
    assert "ema" not in frozen.tensors
    trained.weight.add_(10)
    update_ema([trained, frozen], decay=0.75)
    assert trained.tensors["ema"].tolist() == [value + 2.5 for value in range(5, 11)]
    weight, average = trained.weight.clone(), trained.tensors["ema"].clone()
    exchange_ema([trained, frozen])
    assert torch.equal(trained.weight, average)
    exchange_ema([trained, frozen])
    assert torch.equal(trained.weight, weight)
    assert torch.equal(trained.tensors["ema"], average)


def norms_of(**gradients: list[Tensor]) -> dict[str, float]:
    return group_norms({GroupKey(name): parts for name, parts in gradients.items()}, Mesh(CPU))


def test_norms_of_groups_and_of_all() -> None:
    norms = norms_of(llm=[torch.tensor([3.0]), torch.tensor([[4.0]])], dit=[])
    assert norms == {"llm": 5.0, "dit": 0.0}
    assert total_norm({"llm": 3.0, "dit": 4.0}) == 5.0


def test_parameters_of_one_group_that_lie_differently_are_one_norm() -> None:
    parts = {GroupKey("llm"): [torch.tensor([3.0])], GroupKey("llm", replicated=True): [torch.tensor([4.0])]}
    assert group_norms(parts, Mesh(CPU)) == {"llm": 5.0}


def test_a_norm_whose_square_is_beyond_float32_is_still_a_number() -> None:
    norms = norms_of(llm=[torch.tensor([1e30])], dit=[torch.tensor([1e30])])
    assert total_norm(norms) == pytest.approx(math.sqrt(2) * 1e30)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_element_shows_in_the_total(bad: float) -> None:
    norms = norms_of(llm=[torch.tensor([1.0, bad])], dit=[torch.ones(3)])
    assert not math.isfinite(total_norm(norms))
    assert math.isfinite(norms["dit"])


def test_clipping_scales_all_groups_by_one_factor() -> None:
    llm, dit = GroupKey("llm"), GroupKey("dit")
    gradients = {llm: [torch.tensor([3.0])], dit: [torch.tensor([4.0])]}
    assert clip_factor(5.0, max_norm=10.0) == 1
    scale(gradients, clip_factor(5.0, max_norm=10.0))
    assert (gradients[llm][0].item(), gradients[dit][0].item()) == (3.0, 4.0)
    scale(gradients, clip_factor(5.0, max_norm=1.0))
    assert gradients[llm][0].item() == pytest.approx(0.6, rel=1e-6)
    assert gradients[dit][0].item() == pytest.approx(0.8, rel=1e-6)
