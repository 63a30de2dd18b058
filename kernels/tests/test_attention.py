"""Attention against the written-out softmax, and the order of backends for each device."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from rae_kernels import attention, attention_backend_report
from rae_kernels.attention import cuda_plan, resolve_plan


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


@pytest.mark.parametrize(
    ("major", "minor", "cudnn_first"), [(8, 0, False), (9, 0, True), (10, 0, True), (12, 0, False)]
)
def test_order_of_cuda_backends(major, minor, cudnn_first):
    plan = cuda_plan("cuda:0", major, minor)
    assert (plan.backends[0] == SDPBackend.CUDNN_ATTENTION) == cudnn_first
    assert plan.backends[-1] == SDPBackend.MATH, "every call must find a backend"
    assert f"sm_{major}{minor}" in str(plan) and plan.reason in str(plan)


def test_the_choice_is_logged_once_for_a_device(caplog):
    resolve_plan.cache_clear()
    q, k, v = qkv()
    with caplog.at_level(logging.INFO, logger="rae_kernels"):
        attention(q, k, v)
        attention(q, k, v)
    assert [record.getMessage() for record in caplog.records] == attention_backend_report().splitlines()[:1]
