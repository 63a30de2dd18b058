"""The Triton kernels of SwiGLU against float64, run by test_interpreter. bfloat16 is rounded coarsely here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rae_kernels
from rae_kernels import dispatch
from rae_kernels.spec import swiglu as spec
from rae_kernels.swiglu import swiglu, swiglu_into, swiglu_pair

assert dispatch.INTERPRET

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}

pytestmark = pytest.mark.usefixtures("poisoned")


def check(function, inputs: list[Tensor], random, gradient_like=lambda tensor: tensor) -> None:
    """Values and gradients against plain PyTorch in float64, by the norm of the error."""
    inputs = [tensor.requires_grad_() for tensor in inputs]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    with rae_kernels.use("triton"):
        ours = function(*inputs)
    with rae_kernels.use("reference"):
        exact = function(*exact_inputs)
    outer = gradient_like(random(*ours.shape, dtype=ours.dtype))
    gradients = torch.autograd.grad(ours, inputs, outer)
    expected = torch.autograd.grad(exact, exact_inputs, outer.double())
    for result, true in zip([ours, *gradients], [exact, *expected], strict=True):
        error = (result.double() - true).norm() / true.norm()
        assert error < TOLERANCE[result.dtype], f"relative error {error:.1e} of {result.dtype} {list(result.shape)}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [1, 40, 171, 2048, 2050])
def test_kernels_equal_float64(width, dtype, random):
    check(swiglu, [random(2, 5, 2 * width, dtype=dtype)], random)
    check(swiglu_pair, [random(2, 5, width, dtype=dtype), random(2, 5, width, dtype=dtype)], random)


def test_large_values(random):
    """exp overflows on the way, the result does not."""
    check(swiglu, [200 * random(4, 32)], random)


def test_inputs_whose_rows_are_not_adjacent(random):
    wide = random(2, 3, 100)
    check(swiglu, [wide[..., 4:84].detach()], random)
    check(swiglu, [random(2, 80, 3).transpose(1, 2)], random)
    check(swiglu_pair, [*wide.split(50, dim=-1)], random)
    check(swiglu_pair, [random(2, 40, 3).transpose(1, 2), random(3, 2, 40).transpose(0, 1)], random)


def test_gradients_lie_anywhere(random):
    packed = random(2, 3, 80)
    check(swiglu, [packed], random, lambda g: g.transpose(1, 2).contiguous().transpose(1, 2))
    check(swiglu, [packed], random, lambda g: torch.cat((g, g), dim=-1)[..., : g.shape[-1]])
    check(swiglu, [packed], random, lambda g: g[:1, :1, :1].expand_as(g))


def test_any_number_of_dimensions(random):
    for shape in ((80,), (3, 80), (1, 2, 3, 80)):
        check(swiglu, [random(*shape)], random)


def test_the_activation_is_formed_again_by_the_kernel(random, monkeypatch):
    packed, layer = random(2, 3, 80).requires_grad_(), nn.Linear(40, 8)
    used = (packed, *layer.parameters())
    expected = torch.autograd.grad(layer(swiglu(packed)).square().sum(), used)

    def forbidden(*args):
        raise AssertionError("the specification ran")

    for name in ("swiglu_forward", "swiglu_backward", "swiglu"):
        monkeypatch.setattr(spec, name, forbidden)
    ours = torch.autograd.grad(swiglu_into(packed, layer).square().sum(), used)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_nothing_to_do(random):
    packed = random(0, 3, 80).requires_grad_()
    swiglu(packed).sum().backward()
    assert packed.grad.shape == (0, 3, 80)
