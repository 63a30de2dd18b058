"""The Triton kernels of the norms against float64, run by test_interpreter. bfloat16 is rounded coarsely here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rae_kernels
from rae_kernels import dispatch, norm_operators
from rae_kernels.chunks import chunks
from rae_kernels.triton_impl import norm as launchers

assert dispatch.INTERPRET

MIXED = (torch.float32, torch.bfloat16, torch.float32)
DTYPES = [(torch.float32,) * 3, MIXED, (torch.bfloat16,) * 3, (torch.float16, torch.float16, torch.float32)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def inputs(random):
    """x, y, weight, packed [B, T, 6 C] of given types, sizes ragged unless given."""

    def make(dtypes, channels=72, batch=2, tokens=7) -> list[Tensor]:
        stream, branch, weight = dtypes
        shape = (batch, tokens, channels)
        return [
            random(*shape, dtype=stream).requires_grad_(),
            random(*shape, dtype=branch).requires_grad_(),
            random(channels, dtype=weight).requires_grad_(),
            random(batch, tokens, 6 * channels, dtype=branch).requires_grad_(),
        ]

    return make


def block(x: Tensor, y: Tensor, weight: Tensor, packed: Tensor) -> list[Tensor]:
    """Everything between the products of a DiT block."""
    shift1, scale1, gate1, shift2, scale2, gate2 = chunks(packed, 6)
    h1 = rae_kernels.norm_modulate(x, weight, shift1, scale1, 1e-6)
    x, h2 = rae_kernels.gated_residual_norm_modulate(x, y, gate1, weight, shift2, scale2, 1e-6)
    return [h1, h2, rae_kernels.gated_residual(x, y, gate2)]


def sliced_block(x: Tensor, y: Tensor, weight: Tensor, packed: Tensor) -> list[Tensor]:
    """The same, with the sum of squares passed on: as if of twice as many channels, half of them elsewhere."""
    shift1, scale1, gate1, shift2, scale2, gate2 = chunks(packed, 6)
    channels, eps = 2 * x.shape[-1], 1e-6
    total = rae_kernels.sum_of_squares(x) * 1.5
    h1 = rae_kernels.norm_modulate_from_sum(x, total, channels, weight, shift1, scale1, eps)
    x, total = rae_kernels.gated_residual_sum(x, y, gate1)
    h2 = rae_kernels.norm_modulate_from_sum(x, total * 1.5, channels, weight, shift2, scale2, eps)
    return [h1, h2, rae_kernels.gated_residual(x, y, gate2)]


def plain_norm(x: Tensor, y: Tensor, weight: Tensor, packed: Tensor) -> list[Tensor]:
    return [rae_kernels.rms_norm(x, weight, 1e-6)]


def check(function, inputs: list[Tensor], random) -> None:
    """Values and gradients against plain PyTorch in float64, by the norm of the error."""
    with rae_kernels.use("triton"):
        ours = function(*inputs)
    weights = [random(*out.shape, dtype=out.dtype) for out in ours]
    used = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = torch.autograd.grad(ours, used, weights, allow_unused=True)
    exact_inputs = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    with rae_kernels.use("reference"):
        exact = function(*exact_inputs)
    exact_used = [tensor for tensor in exact_inputs if tensor.requires_grad]
    exact_gradients = torch.autograd.grad(exact, exact_used, [w.double() for w in weights], allow_unused=True)
    # The residual stream is rounded between two norms, and with it all that depends on it.
    stream = inputs[0].dtype
    for result, expected in zip([*ours, *gradients], [*exact, *exact_gradients], strict=True):
        if expected is None:
            assert result is None
            continue
        error = (result.double() - expected).norm() / expected.norm()
        allowed = max(TOLERANCE[result.dtype], TOLERANCE[stream])
        assert error < allowed, f"relative error {error:.1e} of {result.dtype} {list(result.shape)}"


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("function", [block, sliced_block, plain_norm])
def test_kernels_equal_float64(function, dtypes, inputs, random):
    check(function, inputs(dtypes), random)


@pytest.mark.parametrize("channels", [1, 8, 40, 129])
def test_any_number_of_channels(channels, inputs, random):
    check(block, inputs((torch.float32,) * 3, channels, 1, 3), random)


def test_rows_are_shared_out_over_a_fixed_number_of_programs(inputs, random, monkeypatch):
    """More rows than programs: each walks over several."""
    monkeypatch.setattr(launchers, "PROGRAMS", 4)
    check(block, inputs(MIXED, 16, 2, 5), random)
    check(sliced_block, inputs(MIXED, 16, 2, 5), random)


def test_inputs_whose_rows_are_not_adjacent(inputs, random):
    _, y, weight, packed = inputs((torch.float32,) * 3, 24)
    wide = random(2, 7, 60)
    check(block, [wide[..., 5:29].requires_grad_(), y, weight, packed], random)
    transposed = random(2, 24, 7).transpose(1, 2).requires_grad_()
    check(block, [transposed, y, weight, packed], random)


def test_gradients_of_chunks_are_written_in_place(inputs, monkeypatch):
    """No pass over the packed gradient puts it together: torch.cat is not called, nor a copy into it."""
    tensors = inputs(MIXED, 16)

    def forbidden(*args, **kwargs):
        raise AssertionError("the chunks' gradients were put together by a copy")

    monkeypatch.setattr(torch, "cat", forbidden)
    monkeypatch.setattr(Tensor, "copy_", forbidden)
    for function in (block, sliced_block):
        gradient = torch.autograd.grad(sum(out.sum() for out in function(*tensors)), tensors[3])[0]
        assert gradient.shape == tensors[3].shape and gradient.isfinite().all()


def test_the_kernels_ran(inputs, monkeypatch):
    """Not their specification."""

    def forbidden(*args):
        raise AssertionError("the specification ran")

    for name in ("norm_forward", "norm_backward", "residual_forward", "sum_of_squares"):
        monkeypatch.setattr(norm_operators.spec, name, forbidden)
    tensors = inputs(MIXED, 16, 1, 2)
    sum(out.sum() for out in block(*tensors)).backward()
    sum(out.sum() for out in sliced_block(*tensors)).backward()


def test_no_rows(inputs):
    tensors = inputs(MIXED, 16, 0, 3)
    sum(out.sum() for out in block(*tensors)).backward()
    assert torch.equal(tensors[2].grad, torch.zeros(16))
