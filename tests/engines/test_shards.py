from __future__ import annotations

import itertools
import math

import pytest
import torch

from rae_scale.engines.gradients import clip, group_norms, total_norm
from rae_scale.engines.shards import Shard, add_ema, even_split, exchange_ema, update_ema

CPU = torch.device("cpu")


def shard(group: str | None = "dit") -> Shard:
    return Shard("w", (4, 3), 5, 11, group, (7, 9), {"weight": torch.arange(5.0, 11.0)})


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_follow_each_other_and_differ_by_one_at_most(count: int) -> None:
    parts = [even_split(3, 8, index, count) for index in range(count)]
    assert parts[0][0] == 3
    assert parts[-1][1] == 8
    assert all(left[1] == right[0] for left, right in itertools.pairwise(parts))
    lengths = [stop - start for start, stop in parts]
    assert max(lengths) - min(lengths) <= 1


def test_a_shard_gives_away_what_it_owns() -> None:
    (piece,) = shard().pieces()
    assert (piece.kind, piece.shape, piece.start, piece.stop) == ("weight", (4, 3), 7, 9)
    assert piece.tensor.tolist() == [7, 8]


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


def test_norms_of_groups_and_of_all() -> None:
    norms = group_norms({"llm": [torch.tensor([3.0]), torch.tensor([[4.0]])], "dit": []}, None, CPU)
    assert norms == {"llm": 5.0, "dit": 0.0}
    assert total_norm({"llm": 3.0, "dit": 4.0}) == 5.0


def test_a_norm_whose_square_is_beyond_float32_is_still_a_number() -> None:
    norms = group_norms({"llm": [torch.tensor([1e30])], "dit": [torch.tensor([1e30])]}, None, CPU)
    assert total_norm(norms) == pytest.approx(math.sqrt(2) * 1e30)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_element_shows_in_the_total(bad: float) -> None:
    norms = group_norms({"llm": [torch.tensor([1.0, bad])], "dit": [torch.ones(3)]}, None, CPU)
    assert not math.isfinite(total_norm(norms))
    assert math.isfinite(norms["dit"])


def test_clipping_scales_all_groups_by_one_factor() -> None:
    gradients = {"llm": [torch.tensor([3.0])], "dit": [torch.tensor([4.0])]}
    clip(gradients, 5.0, max_norm=10.0)
    assert (gradients["llm"][0].item(), gradients["dit"][0].item()) == (3.0, 4.0)
    clip(gradients, 5.0, max_norm=1.0)
    assert gradients["llm"][0].item() == pytest.approx(0.6, rel=1e-6)
    assert gradients["dit"][0].item() == pytest.approx(0.8, rel=1e-6)
