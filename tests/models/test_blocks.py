from __future__ import annotations

import pytest
import torch
from torch import nn

from rae_scale import ops
from rae_scale.models.blocks import Attention, DiTBlock, Rope, SwiGLU, check_heads
from rae_scale.models.positions import rope_2d_tables


def padded_swiglu(multiple: int = 128) -> SwiGLU:
    torch.manual_seed(0)
    mlp = SwiGLU(20, 8 * 20 // 3, multiple=multiple)
    mlp.init_weights()
    nn.init.normal_(mlp.logical_w12(mlp.w12.bias))
    return mlp


def padding_of(mlp: SwiGLU, w12: torch.Tensor, w12_bias: torch.Tensor, w3: torch.Tensor) -> torch.Tensor:
    packed = [tensor.unflatten(0, (2, mlp.padded_size))[:, mlp.inner_size :] for tensor in (w12, w12_bias)]
    return torch.cat([part.flatten() for part in (*packed, w3[:, mlp.inner_size :])])


def test_swiglu_is_the_function_of_its_logical_width() -> None:
    mlp, exact = padded_swiglu(), SwiGLU(20, 53, multiple=1)
    assert (mlp.padded_size, exact.padded_size) == (128, 53)
    with torch.no_grad():
        exact.w12.weight.copy_(mlp.logical_w12(mlp.w12.weight).flatten(0, 1))
        exact.w12.bias.copy_(mlp.logical_w12(mlp.w12.bias).flatten())
        exact.w3.weight.copy_(mlp.logical_w3())
        exact.w3.bias.copy_(mlp.w3.bias)
    x = torch.randn(2, 3, 20)
    torch.testing.assert_close(mlp(x), exact(x))


def test_training_leaves_the_padding_at_zero() -> None:
    mlp = padded_swiglu()
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        mlp(torch.randn(2, 3, 20)).square().sum().backward()
        gradients = padding_of(mlp, mlp.w12.weight.grad, mlp.w12.bias.grad, mlp.w3.weight.grad)
        assert gradients.count_nonzero() == 0
        optimizer.step()
    parameters = padding_of(mlp, mlp.w12.weight, mlp.w12.bias, mlp.w3.weight)
    assert len(parameters) == mlp.num_padding_parameters
    assert parameters.count_nonzero() == 0


def test_padding_does_not_widen_the_initial_range() -> None:
    mlp = padded_swiglu()
    bounds = {
        "w12": (mlp.logical_w12(mlp.w12.weight), (6 / (20 + 2 * 53)) ** 0.5),
        "w3": (mlp.logical_w3(), (6 / (20 + 53)) ** 0.5),
    }
    for name, (weight, bound) in bounds.items():
        assert 0.95 * bound < weight.abs().max().item() <= bound, name


def test_attention_on_a_slice_of_the_heads_runs_the_same_code() -> None:
    torch.manual_seed(0)
    full = Attention(16, 4, qk_norm=True, attention=ops.attention)
    x, rope = torch.randn(2, 9, 16), Rope(*rope_2d_tables(4, 3))
    halves = []
    for channels in (slice(0, 8), slice(8, 16)):
        half = Attention(16, 4, qk_norm=True, attention=ops.attention)
        half.qkv, half.proj = nn.Linear(16, 24), nn.Linear(8, 16, bias=False)
        with torch.no_grad():
            half.qkv.weight.copy_(full.qkv.weight.unflatten(0, (3, 16))[:, channels].flatten(0, 1))
            half.qkv.bias.copy_(full.qkv.bias.unflatten(0, (3, 16))[:, channels].flatten())
            half.proj.weight.copy_(full.proj.weight[:, channels])
        halves.append(half(x, rope))
    torch.testing.assert_close(halves[0] + halves[1] + full.proj.bias, full(x, rope))


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries_and_keys() -> None:
    torch.manual_seed(0)
    x, rope = torch.randn(2, 4, 16), Rope(*rope_2d_tables(8, 2))
    for qk_norm in (True, False):
        attn = Attention(16, 2, qk_norm=qk_norm, attention=ops.attention)
        nn.init.zeros_(attn.qkv.bias)
        before = attn(x, rope)
        with torch.no_grad():
            attn.qkv.weight[:32].mul_(7)
        assert torch.allclose(attn(x, rope), before, atol=1e-4) == qk_norm


def test_a_new_block_is_the_identity() -> None:
    block = DiTBlock(16, 2, 8, qk_norm=False, attention=ops.attention)
    block.init_weights()
    x = torch.randn(2, 4, 16)
    assert torch.equal(block(x, torch.randn(2, 4, 8), Rope(*rope_2d_tables(8, 2))), x)


@pytest.mark.parametrize(
    ("hidden_size", "num_heads", "multiple", "message"),
    [
        (48, 5, 4, "hidden_size=48 does not divide by num_heads=5; num_heads=4 is the nearest that fits"),
        (48, 8, 4, "over num_heads=8 gives a head width of 6, which does not divide by 4 .*num_heads=6"),
        (50, 2, 4, "hidden_size=50 cannot be cut into heads whose width divides by 4"),
    ],
)
def test_heads_that_do_not_fit_are_refused(hidden_size: int, num_heads: int, multiple: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_heads("DiT", hidden_size, num_heads, multiple)
