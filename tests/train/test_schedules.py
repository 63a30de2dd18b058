from __future__ import annotations

from itertools import pairwise

import pytest

from rae_scale.config.schema import GroupConfig, OptimConfig
from rae_scale.train.schedules import learning_rates, lr_factor


def test_warmup_is_linear_and_its_first_step_is_not_zero() -> None:
    optim = OptimConfig(warmup_ratio=0.04, schedule="constant")
    assert [lr_factor(optim, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_one_to_the_minimum() -> None:
    optim = OptimConfig(warmup_ratio=0.0, min_lr_ratio=0.1)
    curve = [lr_factor(optim, step, 100) for step in range(101)]
    assert curve[0] == 1.0
    assert curve[50] == pytest.approx(0.55)
    assert curve[100] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(curve))


def test_cosine_starts_where_warmup_ends() -> None:
    optim = OptimConfig(warmup_ratio=0.1)
    assert lr_factor(optim, 9, 100) == lr_factor(optim, 10, 100) == 1.0


def test_a_run_that_is_all_warmup_ends_at_one() -> None:
    assert lr_factor(OptimConfig(warmup_ratio=1.0), 9, 10) == 1.0


def test_every_group_is_scaled_by_the_same_factor() -> None:
    groups = {"llm": GroupConfig(lr=1e-4), "dit": GroupConfig(lr=1e-3)}
    optim = OptimConfig(groups=groups, warmup_ratio=0.5)
    assert learning_rates(optim, 0, 8) == {"llm": 1e-4 / 4, "dit": 1e-3 / 4}
