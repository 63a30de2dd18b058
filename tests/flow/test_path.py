"""Times, path and velocity."""

from __future__ import annotations

import pytest
import torch

from rae_scale import ops
from rae_scale.config.schema import FlowConfig
from rae_scale.flow import Stream, interpolate, sample_time, shift_time, velocity_target

INDEX = torch.arange(20_000)


def test_logit_normal_times():
    t = sample_time(FlowConfig(time="logit_normal"), 1, 0, INDEX, alpha=1.0)
    assert t.shape == INDEX.shape and t.dtype == torch.float32
    logit = torch.logit(t.double())
    n = len(INDEX)
    assert abs(logit.mean()) < 4 / n**0.5
    assert abs(logit.std() - 1) < 4 / (2 * n) ** 0.5


def test_uniform_times():
    t = sample_time(FlowConfig(time="uniform"), 1, 0, INDEX, alpha=1.0)
    quantiles = torch.quantile(t, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]), rtol=0, atol=0.015)


@pytest.mark.parametrize("time", ["logit_normal", "uniform"])
def test_times_are_shifted(time):
    cfg = FlowConfig(time=time)
    plain, shifted = (sample_time(cfg, 1, 4, INDEX, alpha) for alpha in (1.0, 8.4853))
    torch.testing.assert_close(shifted, shift_time(plain, 8.4853))
    assert ((shifted >= 0) & (shifted <= 1)).all()


def test_time_belongs_to_the_sample_and_is_independent_of_its_noise():
    cfg = FlowConfig()
    times = sample_time(cfg, 1, 4, INDEX, 1.0)
    assert torch.equal(times[100:103], sample_time(cfg, 1, 4, INDEX[100:103], 1.0))
    assert not torch.equal(times, sample_time(cfg, 1, 5, INDEX, 1.0))
    noise = ops.philox_normal(1, 4, INDEX, (), Stream.NOISE)
    correlation = torch.corrcoef(torch.stack((torch.logit(times), noise)))[0, 1]
    assert abs(correlation) < 4 / len(INDEX) ** 0.5


def test_path_runs_from_data_to_noise_at_constant_velocity():
    generator = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    ends = interpolate(x, eps, torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64))
    assert torch.equal(ends[0], x[0]) and torch.equal(ends[1], eps[1])
    torch.testing.assert_close(ends[2], 0.75 * x[2] + 0.25 * eps[2])
    early, late = (interpolate(x, eps, torch.full((3,), t, dtype=torch.float64)) for t in (0.3, 0.5))
    torch.testing.assert_close((late - early) / 0.2, velocity_target(x, eps))


def test_training_follows_the_same_path():
    index = torch.tensor([7, 2**40])
    x, t = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.9])
    noise = {"seed": 3, "step": 9, "sample_index": index, "stream": Stream.NOISE}
    eps = ops.philox_normal(shape=(4, 5), **noise)
    assert torch.equal(ops.flow_interpolate(x, t, **noise), interpolate(x, eps, t))
