"""Classifier-free guidance: its formula, its interval, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rae_scale.flow import guided

X = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))


class Counted:
    """The velocity `factor * x + t`, which counts its evaluations."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.factor * x + t[:, None, None]


def evaluate(scale: float, t: Tensor, interval: tuple[float, float] = (0.0, 1.0)) -> tuple[Tensor, int, int]:
    cond, uncond = Counted(3.0), Counted(-1.0)
    velocity = guided(cond, uncond, scale, interval)(X, t)
    return velocity, cond.calls, uncond.calls


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, 7.5])
def test_formula_and_cost(scale):
    t = torch.full((4,), 0.4)
    velocity, cond_calls, uncond_calls = evaluate(scale, t)
    torch.testing.assert_close(velocity, -X + scale * 4 * X + 0.4)
    assert (cond_calls, uncond_calls) == {0.0: (0, 1), 1.0: (1, 0)}.get(scale, (1, 1))


@pytest.mark.parametrize(("t", "inside"), [(0.2, True), (0.5, True), (0.7, True), (0.19, False), (0.71, False)])
def test_interval_includes_its_ends_and_is_conditional_outside(t, inside):
    velocity, cond_calls, uncond_calls = evaluate(3.0, torch.full((4,), t), interval=(0.2, 0.7))
    torch.testing.assert_close(velocity, (11.0 if inside else 3.0) * X + t)
    assert (cond_calls, uncond_calls) == (1, int(inside))


def test_outside_the_interval_scale_zero_is_conditional_too():
    velocity, cond_calls, uncond_calls = evaluate(0.0, torch.full((4,), 0.9), interval=(0.0, 0.5))
    torch.testing.assert_close(velocity, 3 * X + 0.9)
    assert (cond_calls, uncond_calls) == (1, 0)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_each_sample_has_its_own_time(scale):
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    velocity, _, _ = evaluate(scale, t, interval=(0.3, 0.7))
    factor = torch.tensor([3.0, -1 + 4 * scale, -1 + 4 * scale, 3.0])[:, None, None]
    torch.testing.assert_close(velocity, factor * X + t[:, None, None])
