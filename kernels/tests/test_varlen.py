"""Packed attention against the softmax written out for each sequence, and the choice of what runs it."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import Tensor

import rae_kernels
from rae_kernels import Sequences, varlen_attention

varlen = sys.modules["rae_kernels.varlen"]

LENGTHS = [3, 1, 5, 1]
TOTAL = sum(LENGTHS)


def qkv(rest: int = 0, heads: int = 4, key_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries [N, 4, 8], keys and values [N, 2, 8]; the last `rest` tokens, of no sequence, are not even numbers."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(TOTAL + rest, h, 8, generator=generator).to(dtype) for h in (heads, key_heads, key_heads)]
    for tensor in tensors:
        tensor[TOTAL:] = torch.nan
    return [tensor.requires_grad_() for tensor in tensors]


def written_out(q: Tensor, k: Tensor, v: Tensor, allowed: list[Tensor], scale: float = 8**-0.5) -> Tensor:
    """allowed: for each sequence, bool [L, L]."""
    parts, start = [], 0
    for length, mask in zip(LENGTHS, allowed, strict=True):
        part = slice(start, start + length)
        repeats = q.shape[1] // k.shape[1]
        keys, values = (x[part].repeat_interleave(repeats, dim=1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q[part], keys) * scale
        parts.append(torch.einsum("hts,shd->thd", scores.masked_fill(~mask, -torch.inf).softmax(-1), values))
        start += length
    return torch.cat(parts)


def masks(kind: str) -> tuple[list[Tensor], dict[str, object]]:
    full = [torch.ones(length, length, dtype=torch.bool) for length in LENGTHS]
    if kind == "full":
        return full, {}
    if kind == "causal":
        return [mask.tril() for mask in full], {"is_causal": True}
    # Any mask, with nothing allowed in its padding.
    generator = torch.Generator().manual_seed(1)
    some = [
        (torch.rand(mask.shape, generator=generator) < 0.5) | torch.eye(len(mask), dtype=torch.bool) for mask in full
    ]
    padded = torch.zeros(len(LENGTHS), max(LENGTHS), max(LENGTHS), dtype=torch.bool)
    for row, mask in enumerate(some):
        padded[row, : len(mask), : len(mask)] = mask
    return some, {"attn_mask": padded}


@pytest.mark.parametrize("kind", ["full", "causal", "any"])
@pytest.mark.parametrize("rest", [0, 2])
def test_each_sequence_alone(kind, rest):
    tensors = qkv(rest)
    allowed, arguments = masks(kind)
    expected = written_out(*tensors, allowed)
    out = varlen_attention(*tensors, Sequences.of(LENGTHS), **arguments)
    torch.testing.assert_close(out[:TOTAL], expected)
    assert torch.equal(out[TOTAL:], torch.zeros(rest, 4, 8))
    weight = torch.randn(out.shape, dtype=out.dtype)
    expected_gradients = torch.autograd.grad((expected * weight[:TOTAL]).sum(), tensors)
    for gradient, wanted in zip(torch.autograd.grad((out * weight).sum(), tensors), expected_gradients, strict=True):
        torch.testing.assert_close(gradient[:TOTAL], wanted[:TOTAL])
        assert torch.equal(gradient[TOTAL:], torch.zeros_like(gradient[TOTAL:]))


def test_a_mask_may_allow_what_is_not_there():
    """Keys of the padding are hidden by the lengths, whatever the mask says."""
    tensors = qkv()
    everything = torch.ones(len(LENGTHS), max(LENGTHS), max(LENGTHS), dtype=torch.bool)
    out = varlen_attention(*tensors, Sequences.of(LENGTHS), attn_mask=everything)
    torch.testing.assert_close(out, written_out(*tensors, masks("full")[0]))


def test_no_query_sees_nothing(monkeypatch):
    """Not even one of the padding: not every backend makes zeros of a softmax over nothing."""
    seen = []

    def watched(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, **settings: object) -> Tensor:
        seen.append(attn_mask.expand(len(LENGTHS), 1, max(LENGTHS), max(LENGTHS)))
        return rae_kernels.attention(q, k, v, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(varlen, "attention", watched)
    for kind in ("full", "any"):
        varlen_attention(*qkv(), Sequences.of(LENGTHS), **masks(kind)[1])
    assert len(seen) == 2 and all(mask.any(-1).all() for mask in seen)


def test_scale():
    tensors = qkv()
    out = varlen_attention(*tensors, Sequences.of(LENGTHS), scale=0.3)
    torch.testing.assert_close(out, written_out(*tensors, masks("full")[0], scale=0.3))


@pytest.mark.parametrize("kind", ["full", "causal", "any"])
def test_gradcheck(kind):
    tensors = qkv()
    arguments = masks(kind)[1]
    assert torch.autograd.gradcheck(lambda *x: varlen_attention(*x, Sequences.of(LENGTHS), **arguments), tensors)


def test_heads_as_many_as_those_of_keys():
    tensors = qkv(heads=2)
    out = varlen_attention(*tensors, Sequences.of(LENGTHS), is_causal=True)
    torch.testing.assert_close(out, written_out(*tensors, masks("causal")[0]))


def test_bfloat16_keeps_its_type():
    tensors = qkv(dtype=torch.bfloat16)
    out = varlen_attention(*tensors, Sequences.of(LENGTHS), is_causal=True)
    assert out.dtype == torch.bfloat16
    expected = written_out(*(x.double() for x in tensors), masks("causal")[0])
    torch.testing.assert_close(out.double(), expected, rtol=0.03, atol=0.03)


def test_autocast_decides_the_type():
    tensors = qkv(dtype=torch.float32)
    expected = varlen_attention(*(x.bfloat16() for x in tensors), Sequences.of(LENGTHS), is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen_attention(*tensors, Sequences.of(LENGTHS), is_causal=True)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_sequences_of_lengths():
    sequences = Sequences.of(LENGTHS)
    assert sequences.starts.tolist() == [0, 3, 4, 9, 10] and sequences.starts.dtype == torch.int32
    assert (sequences.total, sequences.max_length) == (10, 5)


def test_errors_name_the_cause():
    q, k, v = qkv()
    sequences = Sequences.of(LENGTHS)
    with pytest.raises(ValueError, match="3 heads of queries are no multiple of 2"):
        varlen_attention(q[:, :3], k, v, sequences)
    with pytest.raises(ValueError, match="hold 10 tokens, but the run only 9"):
        varlen_attention(q[:9], k[:9], v[:9], sequences)
    with pytest.raises(ValueError, match="exclude each other"):
        varlen_attention(q, k, v, sequences, is_causal=True, attn_mask=masks("any")[1]["attn_mask"])
    with pytest.raises(ValueError, match=r"lengths=\[2, 0\]"):
        Sequences.of([2, 0])


@pytest.mark.parametrize(
    ("changed", "name", "reason"),
    [
        ({}, "torch", "cuDNN and flash"),
        ({"torch_has": False}, "flash-attn", "no torch.nn.attention.varlen"),
        ({"torch_has": False, "flash_has": False}, "padded", "not installed"),
        ({"device_type": "cpu"}, "padded", "CUDA"),
        ({"dtype": torch.float32}, "padded", "float16 only"),
        ({"masked": True}, "padded", "no mask"),
        ({"head_dim": 12}, "padded", "head_dim"),
        ({"head_dim": 264}, "padded", "head_dim"),
        ({"reference": True}, "padded", "RAE_KERNELS"),
    ],
)
def test_choice(changed, name, reason):
    usual = {
        "device_type": "cuda",
        "dtype": torch.bfloat16,
        "head_dim": 128,
        "masked": False,
        "reference": False,
        "torch_has": True,
        "flash_has": True,
    }
    chosen, why = varlen.plan_varlen(**(usual | changed))
    assert chosen == name and reason in why


def test_torch_is_called_by_the_names_it_knows():
    new = ("query", "cu_seq_q", "max_q", "scale", "window_size", "enable_gqa")
    assert varlen.torch_settings(new, True, 0.3) == {"scale": 0.3, "window_size": (-1, 0), "enable_gqa": True}
    assert varlen.torch_settings(new, False, None)["window_size"] == (-1, -1)
    assert varlen.torch_settings(("query", "is_causal", "scale"), True, None) == {"scale": None, "is_causal": True}


@pytest.mark.skipif(varlen.torch_varlen() is None, reason="this torch has no torch.nn.attention.varlen")
def test_torch_has_what_is_passed_to_it():
    """Its operator has a fake, by which a call can be made without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k = (torch.empty(TOTAL, heads, 64, dtype=torch.bfloat16, device="cpu") for heads in (4, 2))
        out = varlen.by_torch(q, k, k, Sequences(torch.zeros(5, dtype=torch.int32), TOTAL, 5), True, 0.125)
        assert out.shape == q.shape and out.dtype == q.dtype


def test_each_kind_of_call_is_logged_once(caplog):
    varlen.resolve.cache_clear()
    tensors = qkv()
    with caplog.at_level(logging.INFO, logger="rae_kernels"):
        for _ in range(2):
            varlen_attention(*tensors, Sequences.of(LENGTHS), is_causal=True)
        with rae_kernels.use("reference"):
            varlen_attention(*tensors, Sequences.of(LENGTHS), is_causal=True)
    messages = [line for line in (record.getMessage() for record in caplog.records) if line.startswith("packed")]
    assert len(messages) == 2 and "cpu, float64, head_dim 8: padded" in messages[0]
    assert "RAE_KERNELS=reference" in messages[1]
    assert messages == varlen.varlen_report().splitlines()[-2:]
