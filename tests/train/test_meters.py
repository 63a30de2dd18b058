from __future__ import annotations

import torch

from rae_scale.train.meters import SumMeter, means, memory_bytes

CPU = torch.device("cpu")


def test_sums_and_counts_are_reduced_at_once() -> None:
    meter, calls = SumMeter(), []

    def two_equal_ranks(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor.dtype)
        return 2 * tensor

    meter.add("loss", torch.tensor(1.5, requires_grad=True), 2)
    meter.add("loss", 0.5, torch.tensor(2))
    meter.add("empty", torch.tensor(0.0), 0)
    sums = meter.reduce(two_equal_ranks, CPU)
    assert calls == [torch.float64]
    assert sums == {"loss": (4.0, 8.0), "empty": (0.0, 0.0)}
    assert means(sums) == {"loss": 0.5, "empty": None}


def test_small_numbers_are_not_lost_in_large_sums() -> None:
    meter = SumMeter()
    meter.add("loss", torch.tensor(2.0**24), 1)
    meter.add("loss", torch.tensor(1.0), 1)
    assert meter.reduce(lambda tensor: tensor, CPU)["loss"][0] == 2.0**24 + 1


def test_nothing_added_is_nothing_reduced() -> None:
    assert SumMeter().reduce(lambda tensor: tensor, CPU) == {}


def test_memory_is_this_process() -> None:
    assert 10e6 < memory_bytes(CPU) < 1e12
