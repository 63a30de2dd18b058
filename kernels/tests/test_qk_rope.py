"""qk_norm_rope without Triton: values in float64, one rounding at lower precision, gradients, operator rules."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from rae_kernels import use
from rae_kernels.qk_rope import qk_norm_rope, qk_rope, qk_rope_backward
from rae_kernels.spec.qk_rope import apply_rope

EPS = 1e-6
B, T, H, D = 2, 5, 3, 8


@pytest.fixture(params=["auto", "reference"])
def implementation(request):
    with use(request.param):
        yield


@pytest.fixture
def angles(random):
    """[T, D / 2]"""
    return random(T, D // 2, dtype=torch.float64)


@pytest.fixture
def tables(angles):
    return tuple(table.repeat_interleave(2, dim=-1) for table in (angles.cos(), angles.sin()))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Each pair multiplied by its phase."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


@pytest.mark.usefixtures("implementation")
def test_each_pair_is_multiplied_by_its_phase(angles, tables, random):
    heads = random(B, T, 3, H, D, dtype=torch.float64)
    q, k, v = qk_norm_rope(heads.flatten(2), *tables, head_dim=D)
    torch.testing.assert_close(q, turned(heads[:, :, 0], angles))
    torch.testing.assert_close(k, turned(heads[:, :, 1], angles))
    assert torch.equal(v, heads[:, :, 2])


@pytest.mark.usefixtures("implementation")
def test_norm_is_per_head_and_comes_first(angles, tables, random):
    heads = random(B, T, 3, H, D, dtype=torch.float64) * 1e-3  # small, so that eps counts
    of_q, of_k = random(D, dtype=torch.float64), random(D, dtype=torch.float64)
    q, k, v = qk_norm_rope(heads.flatten(2), *tables, head_dim=D, q_weight=of_q, k_weight=of_k, eps=EPS)
    torch.testing.assert_close(q, turned(normed(heads[:, :, 0], of_q), angles))
    torch.testing.assert_close(k, turned(normed(heads[:, :, 1], of_k), angles))
    assert torch.equal(v, heads[:, :, 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
def test_results_are_rounded_once(norm, dtype, tables, random):
    """The error is that of one rounding of the exact result: nothing in between is at the low precision."""
    qkv = random(B, T, 3 * 32 * D, dtype=dtype)
    weights = dict(zip(("q_weight", "k_weight"), (random(D), random(D)), strict=True)) if norm else {}
    tables = [table.float() for table in tables]
    with use("reference"):
        exact = qk_norm_rope(qkv.double(), *tables, head_dim=D, **{k: w.double() for k, w in weights.items()})
    for ours, expected in zip(qk_norm_rope(qkv, *tables, head_dim=D, **weights), exact, strict=True):
        assert ours.dtype == dtype
        one_rounding = torch.finfo(dtype).eps / 2 * expected.abs() * 1.01 + 1e-6
        assert ((ours.double() - expected).abs() <= one_rounding).all()


@pytest.mark.usefixtures("implementation")
def test_apply_rope_has_the_type_of_x(tables, random):
    x, (cos, sin) = random(B, T, H, D, dtype=torch.bfloat16), (table.float() for table in tables)
    assert torch.equal(apply_rope(x, cos, sin), apply_rope(x.float(), cos, sin).bfloat16())


@pytest.mark.usefixtures("implementation")
def test_autocast_changes_nothing(tables, random):
    qkv, weight = random(B, T, 3 * H * D, dtype=torch.bfloat16), random(D)
    arguments = {"head_dim": D, "q_weight": weight, "k_weight": weight}
    expected = qk_norm_rope(qkv, *(table.float() for table in tables), **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = qk_norm_rope(qkv, *(table.float() for table in tables), **arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.usefixtures("implementation")
def test_gradients(tables, random):
    qkv = random(1, T, 3 * 2 * D, dtype=torch.float64).requires_grad_()
    weights = [random(D, dtype=torch.float64).requires_grad_() for _ in range(2)]
    check = torch.autograd.gradcheck
    assert check(lambda x: qk_norm_rope(x, *tables, head_dim=D), (qkv,))
    assert check(lambda x, q, k: qk_norm_rope(x, *tables, head_dim=D, q_weight=q, k_weight=k, eps=EPS), (qkv, *weights))


def test_gradient_of_one_result_alone(tables, random):
    qkv = random(B, T, 3 * H * D, dtype=torch.float64).requires_grad_()
    qk_norm_rope(qkv, *tables, head_dim=D)[2].sum().backward()
    expected = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).repeat_interleave(H * D)
    assert torch.equal(qkv.grad, expected.expand_as(qkv))


def test_operators_keep_the_rules_of_pytorch(tables, random):
    cos, sin = (table.float() for table in tables)
    qkv = random(B, T, 3 * H * D).requires_grad_()
    weights = [random(D, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    check = torch.library.opcheck
    check(qk_rope, (qkv, cos, sin, None, None, D, EPS))
    check(qk_rope, (qkv, cos, sin, *weights, D, EPS))
    check(qk_rope, (random(1, 3 * H * D, T).transpose(1, 2), cos, sin, None, None, D, EPS))
    gradients = [random(B, H, T, D).transpose(1, 2) for _ in range(3)]
    check(qk_rope_backward, (*gradients, None, cos, sin, None, None, EPS))
    check(qk_rope_backward, (*gradients, qkv.detach(), cos, sin, *(w.detach() for w in weights), EPS))
    check(qk_rope, (random(1, 1, 3 * H * D), cos[:1], sin[:1], None, None, D, EPS))


def test_compiles_without_a_graph_break(tables, random):
    cos, sin = (table.float() for table in tables)
    qkv, weight = random(B, T, 3 * H * D).requires_grad_(), random(D).requires_grad_()

    def function(qkv: Tensor, weight: Tensor) -> Tensor:
        q, k, v = qk_norm_rope(qkv, cos, sin, head_dim=D, q_weight=weight, k_weight=weight)
        return (q * k * v).sum()

    expected = torch.autograd.grad(function(qkv, weight), (qkv, weight))
    for choice in ("auto", "reference"):
        torch._dynamo.reset()
        with use(choice):
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(torch.autograd.grad(compiled(qkv, weight), (qkv, weight)), expected)


@pytest.mark.parametrize("norm", [False, True])
def test_the_projection_is_kept_only_for_the_norm(norm, tables, random):
    leaf, weight = random(1, 1, 3 * H * D).requires_grad_(), random(D) if norm else None
    qkv = leaf * 1
    storage = weakref.ref(qkv.untyped_storage())
    tables = [table[:1].float() for table in tables]
    results = qk_norm_rope(qkv, *tables, head_dim=D, q_weight=weight, k_weight=weight)
    kept = {t.untyped_storage()._cdata for t in results[0].grad_fn.saved_tensors if t is not None}
    assert (qkv.untyped_storage()._cdata in kept) == norm
    assert all(out.is_contiguous() and out.untyped_storage()._cdata != qkv.untyped_storage()._cdata for out in results)
    del qkv
    assert norm or storage() is None


def test_arguments_that_do_not_fit(tables, random):
    qkv, weight = random(B, T, 3 * H * D), random(D)
    with pytest.raises(ValueError, match=r"qkv is \[2, 5, 72\].*head_dim=10"):
        qk_norm_rope(qkv, *tables, head_dim=10)
    with pytest.raises(ValueError, match=r"sin is \[4, 8\]"):
        qk_norm_rope(qkv, tables[0], tables[1][1:], head_dim=D)
    with pytest.raises(ValueError, match="head_dim=3"):
        qk_norm_rope(qkv, *tables, head_dim=3)
    with pytest.raises(ValueError, match="give both"):
        qk_norm_rope(qkv, *tables, head_dim=D, q_weight=weight)
    with pytest.raises(ValueError, match=r"k_weight is \[4\]"):
        qk_norm_rope(qkv, *tables, head_dim=D, q_weight=weight, k_weight=weight[:4])
