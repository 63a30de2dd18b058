"""What only a GPU can show: the CPU's noise on CUDA, and attention on the chosen backends."""

from __future__ import annotations

import pytest
import torch

from rae_kernels import attention, attention_backend_report, philox_normal
from rae_kernels.philox import philox_words

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_philox_draws_the_same_words_on_both_devices():
    index = torch.tensor([0, 5, 2**40 + 1, 2**48 - 1])
    on_cpu = philox_words(2**64 - 1, 30_000, index, 1000, 3)
    on_cuda = philox_words(2**64 - 1, 30_000, index.cuda(), 1000, 3)
    assert torch.equal(on_cpu, on_cuda.cpu())
    on_cpu, on_cuda = (philox_normal(1, 2, i, (256, 64), 0) for i in (index, index.cuda()))
    assert on_cuda.is_cuda
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head_dim", [40, 64, 72, 96, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_error_is_at_most_twice_that_of_plain_math(head_dim, masked):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, 256, 4, head_dim, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
        for _ in range(3)
    )
    mask = torch.ones(256, 256, dtype=torch.bool, device="cuda").tril() if masked else None

    def written_out(q, k, v):
        scores = torch.einsum("bthd,bshd->bhts", q, k) * head_dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)

    def with_gradients(function, *inputs):
        out = function(*inputs)
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    exact = with_gradients(written_out, *(x.detach().double().requires_grad_() for x in (q, k, v)))
    plain = with_gradients(written_out, q, k, v)
    ours = with_gradients(lambda q, k, v: attention(q, k, v, attn_mask=mask), q, k, v)
    for reference, baseline, result in zip(exact, plain, ours, strict=True):
        allowed = 2 * (baseline - reference).abs().max() + 1e-3
        assert (result - reference).abs().max() <= allowed


def test_report_names_the_device():
    major, minor = torch.cuda.get_device_capability()
    assert f"sm_{major}{minor}" in attention_backend_report()
