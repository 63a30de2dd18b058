"""The Triton kernels of qk_norm_rope against float64, run by test_interpreter. bfloat16 is rounded coarsely here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rae_kernels
from rae_kernels import dispatch
from rae_kernels.qk_rope import qk_norm_rope, qk_rope, qk_rope_backward
from rae_kernels.spec import qk_rope as spec
from rae_kernels.triton_impl import qk_rope as launchers

assert dispatch.INTERPRET

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {FP32: 2e-6, FP16: 1e-3, BF16: 1e-2}

pytestmark = pytest.mark.usefixtures("poisoned")


def make(random, heads, head_dim, dtype=FP32, weight=None, batch=2, tokens=3) -> list[Tensor | None]:
    """qkv, cos, sin, q_weight, k_weight"""
    angles = random(tokens, head_dim // 2).repeat_interleave(2, dim=-1)
    weights = [None if weight is None else random(head_dim, dtype=weight).requires_grad_() for _ in range(2)]
    qkv = random(batch, tokens, 3 * heads * head_dim, dtype=dtype).requires_grad_()
    return [qkv, angles.cos(), angles.sin(), *weights]


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)


def check(inputs: list[Tensor | None], random, gradient_like=lambda tensor: tensor) -> None:
    """Values and gradients against plain PyTorch in float64, by the norm of the error."""

    def apply(qkv, cos, sin, q_weight, k_weight):
        return qk_norm_rope(qkv, cos, sin, head_dim=cos.shape[-1], q_weight=q_weight, k_weight=k_weight)

    def differentiable(tensors):
        return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]

    exact_inputs = [double(tensor) for tensor in inputs]
    with rae_kernels.use("triton"):
        ours = apply(*inputs)
    with rae_kernels.use("reference"):
        exact = apply(*exact_inputs)
    outer = [gradient_like(random(*out.shape, dtype=out.dtype)) for out in ours]
    gradients = torch.autograd.grad(ours, differentiable(inputs), outer)
    expected = torch.autograd.grad(exact, differentiable(exact_inputs), [g.double() for g in outer])
    assert all(out.is_contiguous() for out in ours) and gradients[0].is_contiguous()
    assert torch.equal(ours[2].double(), exact[2])
    for result, true in zip([*ours, *gradients], [*exact, *expected], strict=True):
        error = (result.double() - true).norm() / true.norm()
        assert error < TOLERANCE[result.dtype], f"relative error {error:.1e} of {result.dtype} {list(result.shape)}"


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 8), (5, 40), (2, 64), (3, 72), (4, 96), (20, 128), (3, 6)])
@pytest.mark.parametrize("weight", [None, FP32])
def test_kernels_equal_float64(heads, head_dim, weight, random):
    check(make(random, heads, head_dim, weight=weight), random)


@pytest.mark.parametrize(("dtype", "weight"), [(BF16, None), (BF16, FP32), (BF16, BF16), (FP16, FP32)])
def test_types(dtype, weight, random):
    check(make(random, 3, 72, dtype, weight), random)


@pytest.mark.parametrize("weight", [None, FP32])
def test_programs_walk_over_tokens_and_tiles_of_heads(weight, random, monkeypatch):
    """More tiles than programs, and heads that do not fill their last tile."""
    monkeypatch.setattr(launchers, "PROGRAMS", 4)
    assert launchers.shape_of(19, 72)["HEADS"] == 16
    check(make(random, 19, 72, weight=weight), random)


@pytest.mark.parametrize("weight", [None, FP32])
@pytest.mark.parametrize(
    "layout",
    [
        lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
        lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
        lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
        lambda g: torch.cat((g, g), dim=-1)[..., : g.shape[-1]],
        lambda g: g[:1, :1, :1, :1].expand_as(g),
    ],
    ids=["heads outside", "tokens outside", "channels outside", "gaps", "expanded"],
)
def test_gradients_lie_anywhere(layout, weight, random):
    check(make(random, 3, 40, weight=weight), random, layout)


@pytest.mark.parametrize("weight", [None, FP32])
def test_projections_that_are_not_contiguous(weight, random):
    rest = make(random, 3, 40, weight=weight)[1:]
    check([random(2, 3, 3 * 3 * 40 + 24)[..., 16:-8].requires_grad_(), *rest], random)
    check([random(3, 2, 3 * 3 * 40).transpose(0, 1).requires_grad_(), *rest], random)
    check([random(2, 3 * 3 * 40, 3).transpose(1, 2).requires_grad_(), *rest], random)


def test_the_kernels_ran(random, monkeypatch):
    """Not their specification."""

    def forbidden(*args):
        raise AssertionError("the specification ran")

    for name in ("qk_rope", "qk_rope_backward"):
        monkeypatch.setattr(spec, name, forbidden)
    qkv, cos, sin, q_weight, k_weight = make(random, 2, 8, weight=FP32)
    q, k, v = qk_norm_rope(qkv, cos, sin, head_dim=8, q_weight=q_weight, k_weight=k_weight)
    (q + k + v).sum().backward()


def test_operators_keep_the_rules_of_pytorch(random):
    """The launchers' results share no memory."""
    for weight in (None, FP32):
        qkv, *rest = make(random, 2, 8, weight=weight, batch=1, tokens=1)
        torch.library.opcheck(qk_rope, (qkv, *rest, 8, 1e-6), test_utils=("test_schema", "test_faketensor"))
        detached = [None if tensor is None else tensor.detach() for tensor in (qkv, *rest)]
        gradients = [random(1, 1, 2, 8) for _ in range(3)]
        torch.library.opcheck(
            qk_rope_backward,
            (*gradients, detached[0] if weight else None, *detached[1:], 1e-6),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_nothing_to_do(random):
    qkv, cos, sin, q_weight, k_weight = make(random, 2, 8, weight=FP32, batch=0)
    q, _, _ = qk_norm_rope(qkv, cos, sin, head_dim=8, q_weight=q_weight, k_weight=k_weight)
    q.sum().backward()
    assert q.shape == (0, 3, 2, 8) and torch.equal(q_weight.grad, torch.zeros(8))
