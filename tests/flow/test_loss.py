"""The loss of each sample."""

from __future__ import annotations

import torch

from rae_scale import ops
from rae_scale.flow import Stream, flow_loss, velocity_target


def test_mean_squared_error_of_each_sample():
    velocity = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 1.0]]])
    target = torch.zeros_like(velocity)
    torch.testing.assert_close(flow_loss(velocity, target), torch.tensor([7.5, 0.25]))
    weighted = flow_loss(velocity, target, weight=torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(weighted, torch.tensor([0.0, 0.5]))


def test_low_precision_velocities_are_compared_in_float32():
    """In bfloat16 the small difference to the target would vanish, and the sum would stop growing."""
    velocity = torch.ones(1, 256, 64, dtype=torch.bfloat16)
    loss = flow_loss(velocity, torch.full((1, 256, 64), 1.001))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([1e-6]), rtol=1e-3, atol=0)


def test_gradient_of_a_sample_is_that_of_a_mean():
    velocity = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    flow_loss(velocity, target, weight=torch.tensor([3.0, 0.0])).sum().backward()
    torch.testing.assert_close(velocity.grad[0], 3 * 2 * (velocity - target)[0].detach() / 12)
    assert not velocity.grad[1].any()


def test_training_computes_the_same_loss():
    generator = torch.Generator().manual_seed(0)
    x, velocity = (torch.randn(2, 4, 5, generator=generator) for _ in range(2))
    weight = torch.tensor([0.5, 1.0])
    noise = {"seed": 3, "step": 9, "sample_index": torch.tensor([7, 2**40]), "stream": Stream.NOISE}
    target = velocity_target(x, ops.philox_normal(shape=(4, 5), **noise))
    assert torch.equal(ops.flow_matching_loss(velocity, x, **noise, weight=weight), flow_loss(velocity, target, weight))
    part = ops.flow_matching_loss(velocity[:, 1:3], x, **noise, first_token=1)
    assert torch.equal(part, flow_loss(velocity[:, 1:3], target[:, 1:3]))
