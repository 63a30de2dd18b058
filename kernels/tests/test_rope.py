"""Rotary embedding as complex multiplication."""

from __future__ import annotations

import torch

from rae_kernels import apply_rope


def tables(tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    angles = torch.randn(tokens, head_dim // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    repeated = angles.repeat_interleave(2, dim=-1)
    return angles, repeated.cos(), repeated.sin()


def test_each_pair_is_multiplied_by_its_phase():
    angles, cos, sin = tables(tokens=6, head_dim=8)
    x = torch.randn(2, 6, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    phase = torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.view_as_real(pairs * phase).flatten(-2)
    torch.testing.assert_close(apply_rope(x, cos, sin), expected)


def test_result_has_the_type_of_x_and_float32_arithmetic():
    _, cos, sin = tables(tokens=6, head_dim=8)
    cos, sin = cos.float(), sin.float()
    x = torch.randn(2, 6, 3, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    rotated = apply_rope(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rope(x.float(), cos, sin).bfloat16())


def test_gradients():
    _, cos, sin = tables(tokens=3, head_dim=4)
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin), (x,))
