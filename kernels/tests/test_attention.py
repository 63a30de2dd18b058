"""Attention against the written-out softmax, and the order of backends for each kind of call."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from rae_kernels import attention, attention_backend_report
from rae_kernels.attention import AttentionCall, AttentionPlan, ContiguousGradient, plan_attention, resolve_plan

BF16 = torch.bfloat16
attention_module = sys.modules["rae_kernels.attention"]  # the package's attribute of this name is the function


def qkv(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """[B=2, T=5, H=3, D=8] queries, and keys and values of S=5."""
    return [torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]


def written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0, scale: float = 8**-0.5) -> Tensor:
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale + bias
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def test_dense():
    q, k, v = qkv()
    torch.testing.assert_close(attention(q, k, v), written_out(q, k, v))
    torch.testing.assert_close(attention(q, k, v, scale=0.3), written_out(q, k, v, scale=0.3))


def test_causal_boolean_and_additive_masks_agree():
    q, k, v = qkv()
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    bias = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~allowed, float("-inf"))
    expected = written_out(q, k, v, bias)
    torch.testing.assert_close(attention(q, k, v, is_causal=True), expected)
    torch.testing.assert_close(attention(q, k, v, attn_mask=allowed), expected)
    torch.testing.assert_close(attention(q, k, v, attn_mask=bias), expected)


def test_fewer_queries_than_keys():
    q, k, v = qkv()
    torch.testing.assert_close(attention(q[:, :2], k, v), written_out(q[:, :2], k, v))


def test_compiles_without_a_graph_break():
    q, k, v = qkv(torch.float32)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))


def test_compiles_without_a_graph_break_where_backends_are_ordered(monkeypatch):
    """As on a GPU; the CPU has plain math to offer for it."""
    monkeypatch.setattr(attention_module, "resolve_plan", lambda call: AttentionPlan((SDPBackend.MATH,), "a test"))
    q, k, v = (x.requires_grad_() for x in qkv(torch.float32))
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), fullgraph=True, backend="aot_eager")
    out, expected = compiled(q, k, v), written_out(q, k, v)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def order(capability: tuple[int, int], dtype: torch.dtype = BF16, head_dim: int = 128, **kind: bool) -> str:
    """First letters of the backends: c(uDNN), f(lash), e(fficient), m(ath)."""
    call = AttentionCall("cuda:0", capability, dtype, head_dim, kind.get("masked", False), kind.get("one_query", False))
    plan = plan_attention(call)
    assert plan.reason in str(plan)
    return "".join(backend.name[0].lower() for backend in plan.backends)


@pytest.mark.parametrize(
    ("capability", "backends"), [((8, 0), "fem"), ((9, 0), "cfem"), ((10, 0), "cfem"), ((12, 0), "fem")]
)
def test_order_of_backends_by_device(capability, backends):
    assert order(capability) == backends


@pytest.mark.parametrize(
    ("head_dim", "backends"),
    [(40, "cfem"), (72, "cfem"), (96, "cfem"), (128, "cfem"), (100, "fem"), (136, "fem"), (256, "fem"), (264, "em")],
)
def test_order_of_backends_by_head_dim(head_dim, backends):
    assert order((9, 0), head_dim=head_dim) == backends


def test_order_of_backends_by_type_mask_and_length():
    assert order((9, 0), torch.float32) == order((9, 0), torch.float64) == "em"
    assert order((9, 0), masked=True) == "cem", "flash takes no mask"
    assert order((8, 0), masked=True) == "em"
    assert order((9, 0), one_query=True) == "fem"


def test_reasons_name_what_decided():
    def reason(**changed: object) -> str:
        call = AttentionCall("cuda:0", (9, 0), BF16, 128, False, False)._replace(**changed)
        assert f"sm_{call.capability[0]}{call.capability[1]}" in str(call)
        return plan_attention(call).reason

    assert "fastest on sm_90" in reason()
    assert "outside sm_90" in reason(capability=(8, 0))
    assert "head_dim" in reason(head_dim=136)
    assert "single query" in reason(one_query=True)
    assert "flash takes no mask" in reason(masked=True, capability=(8, 0))
    assert "float16 only" in reason(dtype=torch.float32)


def test_other_devices_leave_the_choice_to_pytorch():
    assert plan_attention(AttentionCall("cpu", None, BF16, 64, False, False)).backends == ()


def test_gradient_arrives_contiguous():
    seen = []
    x = torch.randn(2, 3, 4, 8, requires_grad=True)
    y = x.transpose(1, 2).clone().transpose(1, 2)
    y.register_hook(lambda gradient: seen.append(gradient.stride()))
    ContiguousGradient.apply(y).sum().backward()
    assert seen == [(96, 32, 8, 1)]
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_the_type_that_counts_is_autocast_s(caplog):
    """It hands float32 to attention as bfloat16: a plan for float32 would leave the fast backends out."""
    q, k, v = qkv(torch.float32)
    assert attention_module.autocast_dtype(q) == torch.float32
    with torch.autocast("cpu", BF16):
        assert attention_module.autocast_dtype(q) == BF16 == attention(q, k, v).dtype
        assert attention_module.autocast_dtype(q.double()) == torch.float64 == attention(*qkv()).dtype


def test_shapes_without_values():
    q, k, v = (x.to("meta") for x in qkv(torch.float32))
    assert attention(q, k, v).shape == q.shape


def test_each_kind_of_call_is_logged_once(caplog):
    resolve_plan.cache_clear()
    attention_module._lines.clear()
    q, k, v = qkv()
    with caplog.at_level(logging.INFO, logger="rae_kernels"):
        attention(q, k, v)
        attention(q, k, v)
        attention(q, k, v, attn_mask=torch.ones(5, 5, dtype=torch.bool))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and "with a mask" in messages[1]
    assert messages == attention_backend_report().splitlines()
