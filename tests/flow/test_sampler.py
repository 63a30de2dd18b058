"""Samplers on problems with known solutions, and the times at which they evaluate."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rae_scale.config.schema import SamplerConfig
from rae_scale.flow import sample, shift_time
from rae_scale.flow.sampler import clean_grid, official_grid

ALPHA = math.sqrt(256 * 1152 / 4096)
NOISE = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))


class PointMass:
    """Data that is one point: the path to it is straight. Records the times of its evaluations."""

    def __init__(self) -> None:
        self.target = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,) and t.dtype == torch.float32 and t[0] == t[1]
        self.times.append(t[0].item())
        return (x - self.target) / t[:, None, None]


def gaussian_velocity(x: Tensor, t: Tensor) -> Tensor:
    """Data from N(0, 1/4): the exact flow scales noise by 1/2."""
    t = t[:, None, None]
    variance = t**2 + (1 - t) ** 2 / 4
    return (t - (1 - t) / 4) / variance * x


def final_error(method: str, steps: int) -> float:
    cfg = SamplerConfig(method=method, steps=steps)
    return (sample(gaussian_velocity, NOISE, cfg, 2.0) - NOISE / 2).abs().max().item()


@pytest.mark.parametrize("alpha", [0.3535533905932738, 1.0, ALPHA])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_clean_grid_falls_from_exactly_one_to_exactly_zero(alpha, steps):
    grid = clean_grid(steps, alpha)
    assert len(grid) == steps + 1 and grid == sorted(grid, reverse=True)
    assert (grid[0], grid[-1]) == (1.0, 0.0)
    assert grid == pytest.approx([shift_time(1 - i / steps, alpha) for i in range(steps + 1)])


def test_official_grid_has_the_published_times():
    grid = official_grid(50, ALPHA)
    assert grid[:3] == pytest.approx([0.008422, 0.153986, 0.271140], abs=1e-6)
    assert grid[-3:] == pytest.approx([0.994987, 0.997601, 1.0], abs=1e-6)
    unshifted = [round(t * 1000) - 1 for t in official_grid(50, 1.0)]
    assert unshifted[:3] == [0, 20, 41] and unshifted[-3:] == [958, 979, 999]


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 5, 50])
def test_straight_paths_are_followed_exactly(method, steps):
    data = PointMass()
    latents = sample(data, NOISE, SamplerConfig(method=method, steps=steps), ALPHA)
    torch.testing.assert_close(latents, data.target, rtol=0, atol=1e-5)


def test_euler_evaluates_each_time_but_the_last():
    data = PointMass()
    sample(data, NOISE, SamplerConfig(steps=50), ALPHA)
    assert data.times == pytest.approx(clean_grid(50, ALPHA)[:-1])


def test_heun_evaluates_both_ends_and_never_time_zero():
    data = PointMass()
    sample(data, NOISE, SamplerConfig(method="heun", steps=10), ALPHA)
    grid = clean_grid(10, ALPHA)
    both_ends = [t for pair in pairwise(grid) for t in pair]
    assert data.times == pytest.approx(both_ends[:-1])


def test_order_of_convergence():
    """Halving the step halves Euler's error and quarters Heun's."""
    assert final_error("euler", 40) / final_error("euler", 80) == pytest.approx(2, rel=0.1)
    assert final_error("heun", 40) / final_error("heun", 80) == pytest.approx(4, rel=0.15)


def test_compat_repeats_the_official_evaluations_and_stops_short():
    data = PointMass()
    latents = sample(data, NOISE, SamplerConfig(grid="compat"), ALPHA)
    grid = official_grid(50, ALPHA)
    assert data.times == pytest.approx([*grid[48:0:-1], grid[48]])
    left_over = grid[0] / grid[48] * (1 + (grid[49] - grid[48]) / grid[48])
    torch.testing.assert_close(latents, data.target + left_over * (NOISE - data.target), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"), [({"method": "heun"}, "sampler.method=heun"), ({"steps": 2}, "sampler.steps=2")]
)
def test_compat_refuses_what_the_official_grid_does_not_have(settings, named):
    with pytest.raises(ValueError, match=named):
        sample(PointMass(), NOISE, SamplerConfig(grid="compat", **settings), ALPHA)


def test_latents_are_float32_without_gradient_and_noise_is_untouched():
    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    noise = NOISE.bfloat16()
    before = noise.clone()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return x.bfloat16() * weight

    latents = sample(velocity, noise, SamplerConfig(steps=2), 1.0)
    assert latents.dtype == torch.float32 and not latents.requires_grad
    assert torch.equal(noise, before)


def test_steps_of_a_low_precision_velocity_are_float32():
    cfg = SamplerConfig(steps=10)
    low = sample(lambda x, t: x.bfloat16(), NOISE, cfg, ALPHA)
    assert torch.equal(low, sample(lambda x, t: x.bfloat16().float(), NOISE, cfg, ALPHA))
