"""The Triton kernels of flow matching against their specification, run by test_interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rae_kernels
from rae_kernels import dispatch
from rae_kernels.flow import flow_interpolate, flow_matching_loss

assert dispatch.INTERPRET

pytestmark = pytest.mark.usefixtures("poisoned")

INDEX = torch.tensor([2**47 + 11, 3])
LARGE = {"seed": 2**64 - 3, "step": 2**32 - 1, "sample_index": INDEX, "stream": 2**16 - 1}
SMALL = {"seed": 1, "step": 1, "sample_index": INDEX, "stream": 1}
NOISES = pytest.mark.parametrize(
    "noise", [LARGE, SMALL, SMALL | {"seed": 2**63, "step": 0}], ids=["large", "small", "mid"]
)

# (tokens, channels, first token, tokens of the velocity): runs that do and do not begin at a counter's first number,
# and samples of more than one program.
SHAPES = [
    (4, 64, 0, 4),
    (4, 64, 2, 2),
    (7, 5, 0, 7),
    (7, 5, 1, 3),
    (7, 5, 2, 5),
    (7, 5, 3, 1),
    (1, 1, 0, 1),
    (40, 72, 0, 40),
]
SHAPES += [(40, 73, 17, 23), (90, 73, 1, 89)]


def reference(velocity: Tensor, x: Tensor, **arguments: object) -> Tensor:
    with rae_kernels.use("reference"):
        return flow_matching_loss(velocity, x, **arguments)


@NOISES
@pytest.mark.parametrize("shape", [(4, 64), (7, 5), (1, 1), (40, 73)], ids=str)
def test_path(random, noise, shape):
    x, t = random(2, *shape), torch.tensor([0.3, 0.9])
    with rae_kernels.use("reference"):
        expected = flow_interpolate(x, t, **noise)
    found = flow_interpolate(x, t, **noise)
    assert found.dtype == x.dtype and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_path_in_the_type_of_the_data(random, dtype):
    x, t = random(2, 7, 5, dtype=dtype), torch.tensor([0.3, 0.9])
    found = flow_interpolate(x, t, **LARGE)
    assert found.dtype == dtype
    exact = flow_interpolate(x.float(), t, **LARGE)
    torch.testing.assert_close(found.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@NOISES
@pytest.mark.parametrize(("tokens", "channels", "first", "part"), SHAPES)
def test_loss_and_gradient(random, noise, tokens, channels, first, part):
    x, velocity, exact = random(2, tokens, channels), random(2, part, channels), None
    exact = velocity.double().requires_grad_()
    velocity.requires_grad_()
    weight, for_loss = torch.tensor([1.5, 0.25]), torch.tensor([-2.0, 3.0])
    arguments = noise | {"first_token": first, "weight": weight}
    loss, expected = flow_matching_loss(velocity, x, **arguments), reference(exact, x, **arguments)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    without = flow_matching_loss(velocity.detach(), x, **arguments)
    assert torch.equal(without, loss)
    loss.backward(for_loss)
    expected.backward(for_loss.double())
    largest = exact.grad.abs().max().item()
    torch.testing.assert_close(velocity.grad, exact.grad.float(), rtol=1e-6, atol=5e-6 * largest)


def test_the_gradient_is_exact_up_to_float32_rounding(random):
    """Where the noise is known exactly: its own gradient at v = 0, x = 0 gives it back."""
    x, zero = torch.zeros(2, 7, 5), torch.zeros(2, 7, 5, requires_grad=True)
    (of_zero,) = torch.autograd.grad(flow_matching_loss(zero, x, **LARGE).sum(), zero)
    eps = flow_interpolate(x, torch.ones(2), **LARGE)
    torch.testing.assert_close(of_zero, -2 / 35 * eps, rtol=2e-7, atol=0)
    x, velocity = random(2, 7, 5), random(2, 7, 5).requires_grad_()
    loss = flow_matching_loss(velocity, x, **LARGE)
    (gradient,) = torch.autograd.grad(loss, velocity, torch.tensor([3.0, -0.1]))
    difference = velocity.detach() - (eps - x)
    factor = torch.tensor([3.0, -0.1])[:, None, None] * (2 / 35)
    torch.testing.assert_close(gradient, difference * factor, rtol=2e-7, atol=0)
    torch.testing.assert_close(loss, difference.square().flatten(1).mean(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_types_of_their_own(random, dtypes):
    velocity, x = random(2, 3, 5, dtype=dtypes[0]).requires_grad_(), random(2, 7, 5, dtype=dtypes[1])
    exact = velocity.detach().double().requires_grad_()
    loss, expected = (f(v, x, **LARGE, first_token=3) for f, v in ((flow_matching_loss, velocity), (reference, exact)))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    loss.sum().backward()
    expected.sum().backward()
    # The interpreter does not round to nearest.
    rounding = 3 * torch.finfo(dtypes[0]).eps
    torch.testing.assert_close(velocity.grad.double(), exact.grad, rtol=rounding, atol=1e-6)


def test_strided_tensors(random):
    x, velocity, t = random(4, 7, 5)[::2], random(2, 5, 4).transpose(1, 2), torch.rand(2, 2)[:, 0]
    index = torch.stack((INDEX, INDEX + 1), dim=1)[:, 0]
    noise = LARGE | {"sample_index": index}
    expected = flow_matching_loss(velocity.contiguous(), x.contiguous(), **LARGE, first_token=2)
    assert torch.equal(flow_matching_loss(velocity, x, **noise, first_token=2), expected)
    assert torch.equal(flow_interpolate(x, t, **noise), flow_interpolate(x.contiguous(), t.contiguous(), **LARGE))
    wide = velocity.new_zeros(2, 4, 8)[..., :5].copy_(velocity)
    assert torch.equal(flow_matching_loss(wide, x, **noise, first_token=2), expected)


def test_slices_hold_the_noise_of_the_whole(random):
    x = torch.zeros(2, 7, 5)
    eps = flow_interpolate(x, torch.ones(2), **LARGE)
    for first in range(7):
        velocity = torch.zeros(2, 7 - first, 5, requires_grad=True)
        loss = flow_matching_loss(velocity, x, **LARGE, first_token=first)
        (gradient,) = torch.autograd.grad(loss.sum(), velocity)
        torch.testing.assert_close(gradient * (-velocity[0].numel() / 2), eps[:, first:], rtol=1e-6, atol=0)


def test_empty_batches_launch_nothing():
    x = torch.zeros(0, 7, 5)
    noise = LARGE | {"sample_index": INDEX[:0]}
    velocity = x.clone().requires_grad_()
    assert flow_interpolate(x, torch.zeros(0), **noise).shape == x.shape
    loss = flow_matching_loss(velocity, x, **noise)
    loss.sum().backward()
    assert loss.shape == (0,) and velocity.grad.shape == x.shape
