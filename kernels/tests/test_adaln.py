"""RMSNorm, modulation, gated residual and SwiGLU: values in float64, rounding at lower precision, gradients."""

from __future__ import annotations

import pytest
import torch

from rae_kernels import gated_residual, modulate, rms_norm, rms_norm_from_sum, sum_of_squares, swiglu


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_divides_by_the_root_mean_square():
    x, weight = double(2, 5, 12), double(12, seed=1)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected, rtol=1e-12, atol=1e-12)


def test_rms_norm_eps_counts():
    x = torch.full((1, 4), 1e-3)
    torch.testing.assert_close(rms_norm(x, torch.ones(4), 1e-6), torch.full((1, 4), 0.5**0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_rounds_once(dtype):
    """The error is that of one rounding of the exact result: nothing in between is at the low precision."""
    x = double(64, 1152).to(dtype)
    weight = double(1152, seed=1).float()
    exact = rms_norm(x.double(), weight.double(), 1e-6)
    ours = rms_norm(x, weight, 1e-6)
    assert ours.dtype == dtype
    one_rounding = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + torch.finfo(dtype).smallest_normal
    assert ((ours.double() - exact).abs() <= one_rounding).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_slices_with_the_sum_of_all_are_the_whole(dtype):
    x, weight = double(3, 7, 12).to(dtype), double(12, seed=1)
    total = sum(sum_of_squares(part) for part in x.split(5, dim=-1))
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    parts = [
        rms_norm_from_sum(part, total, 12, part_of_weight, 1e-6)
        for part, part_of_weight in zip(x.split(5, dim=-1), weight.split(5), strict=True)
    ]
    whole = rms_norm(x, weight, 1e-6)
    assert parts[0].dtype == dtype
    torch.testing.assert_close(
        torch.cat(parts, dim=-1), whole, rtol=2e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )


def test_modulate_and_gated_residual():
    x, a, b = double(2, 3, 4), double(2, 3, 4, seed=1), double(2, 3, 4, seed=2)
    torch.testing.assert_close(modulate(x, a, b), x + x * b + a)
    torch.testing.assert_close(gated_residual(x, a, b), x + a * b)


def test_swiglu_takes_the_gate_first():
    gate, value = double(3, 5), double(3, 5, seed=1)
    expected = gate / (1 + torch.exp(-gate)) * value
    torch.testing.assert_close(swiglu(torch.cat((gate, value), dim=-1)), expected)


def test_gradients():
    x, a, b = (double(2, 3, 4, seed=seed).requires_grad_() for seed in range(3))
    weight = double(4, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(modulate, (x, a, b))
    assert torch.autograd.gradcheck(gated_residual, (x, a, b))
    assert torch.autograd.gradcheck(swiglu, (x,))
