"""The norms without Triton: values in float64, one rounding at lower precision, gradients, operator rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import rae_kernels
from rae_kernels import (
    chunks,
    gated_residual,
    gated_residual_norm_modulate,
    gated_residual_sum,
    norm_modulate,
    norm_modulate_from_sum,
    norm_operators,
    rms_norm,
    sum_of_squares,
    use,
)

EPS = 1e-6


def written_out(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight * (1 + scale) + shift


@pytest.fixture
def tensors(random):
    """x, y, gate, weight, shift, scale in float64."""
    full = (2, 5, 12)
    return [random(*shape, dtype=torch.float64) for shape in (full, full, full, (12,), full, full)]


@pytest.fixture(params=["auto", "reference"])
def implementation(request):
    with use(request.param):
        yield


@pytest.mark.usefixtures("implementation")
def test_values(tensors):
    x, y, gate, weight, shift, scale = tensors
    torch.testing.assert_close(rms_norm(x, weight, EPS), written_out(x, weight, x * 0, x * 0))
    torch.testing.assert_close(norm_modulate(x, weight, shift, scale, EPS), written_out(x, weight, shift, scale))
    torch.testing.assert_close(gated_residual(x, y, gate), x + gate * y)
    out, h = gated_residual_norm_modulate(x, y, gate, weight, shift, scale, EPS)
    torch.testing.assert_close(out, x + gate * y)
    torch.testing.assert_close(h, written_out(x + gate * y, weight, shift, scale))


@pytest.mark.usefixtures("implementation")
def test_eps_counts():
    x = torch.full((1, 4), 1e-3)
    torch.testing.assert_close(rms_norm(x, torch.ones(4), EPS), torch.full((1, 4), 0.5**0.5))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_slices_with_the_sum_of_all_are_the_whole(dtype, tensors):
    x, y, gate, weight, shift, scale = (tensor.to(dtype) for tensor in tensors)
    whole_out, whole = gated_residual_norm_modulate(x, y, gate, weight, shift, scale, EPS)
    parts = [gated_residual_sum(*(t.split(5, dim=-1)[i] for t in (x, y, gate))) for i in range(3)]
    total = sum(part for _, part in parts)
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(total, sum_of_squares(whole_out))
    normed = [
        norm_modulate_from_sum(out, total, 12, *(t.split(5, dim=-1)[i] for t in (weight, shift, scale)), EPS)
        for i, (out, _) in enumerate(parts)
    ]
    assert normed[0].dtype == dtype
    tolerance = {} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(torch.cat(normed, dim=-1), whole, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once(dtype, random):
    """The error is that of one rounding of the exact result: nothing in between is at the low precision."""
    x, shift, scale = (random(16, 1152, dtype=dtype) for _ in range(3))
    weight = random(1152)
    with use("reference"):
        exact = norm_modulate(x.double(), weight.double(), shift.double(), scale.double(), EPS)
    ours = norm_modulate(x, weight, shift, scale, EPS)
    assert ours.dtype == dtype
    one_rounding = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-6
    assert ((ours.double() - exact).abs() <= one_rounding).all()


def test_types_of_results(random):
    x, weight = random(2, 3, 8), random(8)
    y, gate, shift, scale = (random(2, 3, 8, dtype=torch.bfloat16) for _ in range(4))
    assert norm_modulate(x, weight, shift, scale, EPS).dtype == torch.float32
    assert rms_norm(y, weight, EPS).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, h = gated_residual_norm_modulate(x, y, gate, weight, shift, scale, EPS)
        assert norm_modulate(x, weight, shift, scale, EPS).dtype == torch.bfloat16
    assert out.dtype == torch.float32, "the residual stream keeps its precision"
    assert h.dtype == torch.bfloat16


@pytest.mark.usefixtures("implementation")
def test_gradients(tensors):
    x, y, gate, weight, shift, scale = (tensor.requires_grad_() for tensor in tensors)
    total = sum_of_squares(x.detach()).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda *a: rms_norm(*a, EPS), (x, weight))
    assert check(lambda *a: norm_modulate(*a, EPS), (x, weight, shift, scale))
    assert check(gated_residual, (x, y, gate))
    assert check(gated_residual_sum, (x, y, gate))
    assert check(sum_of_squares, (x,))
    assert check(lambda *a: gated_residual_norm_modulate(*a, EPS), (x, y, gate, weight, shift, scale))
    assert check(lambda x, t, *a: norm_modulate_from_sum(x, t, 30, *a, EPS), (x, total, weight, shift, scale))


def test_operators_keep_the_rules_of_pytorch(tensors):
    x, y, gate, weight, shift, scale = (tensor.float().requires_grad_() for tensor in tensors)
    total = sum_of_squares(x.detach()).requires_grad_()
    check, bf16 = torch.library.opcheck, torch.bfloat16
    check(norm_operators.norm, (x, weight, None, None, None, 12, EPS, torch.float32))
    check(norm_operators.norm, (x, weight, shift, scale, None, 12, EPS, bf16))
    check(norm_operators.norm, (x, weight, shift, scale, total, 30, EPS, torch.float32))
    check(norm_operators.gated_residual, (x, y, gate, False))
    check(norm_operators.gated_residual, (x, y, gate, True))
    check(norm_operators.gated_residual_norm, (x, y, gate, weight, shift, scale, EPS, bf16))
    check(norm_operators.sum_of_squares, (x,))
    x, y, gate, weight, shift, scale, total = (t.detach() for t in (x, y, gate, weight, shift, scale, total))
    memory = [torch.empty_like(x) for _ in range(3)]
    check(norm_operators.norm_backward, (y, x, weight, scale, total, *memory[:2], False, 12))
    check(norm_operators.norm_backward, (y, x, weight, None, total, None, None, True, 12))
    check(norm_operators.gated_residual_backward, (y, None, None, y, gate, memory[0]))
    check(norm_operators.gated_residual_backward, (y, total, x, y, gate, memory[0]))
    check(norm_operators.gated_residual_norm_backward, (y, y, x, y, gate, weight, scale, total, *memory))
    check(norm_operators.sum_of_squares_backward, (total, x))


def test_compiles_without_a_graph_break(tensors):
    """As opaque operators, and as plain PyTorch, which the compiler may fuse."""
    x, y, gate, weight, shift, scale = (tensor.float().requires_grad_() for tensor in tensors)

    def function(x):
        out, h = gated_residual_norm_modulate(x, y, gate, weight, shift, scale, EPS)
        return gated_residual(out, h, gate)

    expected = torch.autograd.grad(function(x).square().sum(), x)[0]
    for choice in ("auto", "reference"):
        torch._dynamo.reset()
        with use(choice):
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x)[0], expected)


def test_shapes_must_be_equal(random):
    x, shared = random(2, 3, 8), random(2, 1, 8)
    with pytest.raises(ValueError, match=r"scale is \[2, 1, 8\]"):
        norm_modulate(x, random(8), x, shared, EPS)
    per_sample = norm_modulate(x, random(8), shared.expand_as(x), shared.expand_as(x), EPS)
    assert per_sample.shape == x.shape


def test_backward_keeps_inputs_only(tensors):
    """The rows x + gate * y and their norm exist for as long as their reader needs them, no longer."""
    x, y, gate, weight, shift, scale = (tensor.float().requires_grad_() for tensor in tensors)
    _, h = gated_residual_norm_modulate(x, y, gate, weight, shift, scale, EPS)
    kept = {t.untyped_storage().data_ptr(): t.nbytes for t in h.grad_fn.saved_tensors if t is not None}
    inputs = {t.untyped_storage().data_ptr() for t in (x, y, gate, weight, shift, scale)}
    assert sum(nbytes for pointer, nbytes in kept.items() if pointer not in inputs) == 2 * 5 * 4


class TestChunks:
    @staticmethod
    def function(packed: Tensor, x: Tensor) -> Tensor:
        shift, scale, gate, unused = chunks(packed, 4)
        h = norm_modulate(x, torch.ones(3, dtype=x.dtype), shift, scale, EPS)
        return gated_residual(h, h, gate) + (unused * 2 + gate).exp()

    def test_gradients(self, random):
        packed = random(2, 5, 12, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(self.function, (packed, random(2, 5, 3, dtype=torch.float64)))

    def test_a_chunk_that_two_operators_read(self, random):
        """The second gradient must not replace the first while the packed one waits for the gate's."""
        x = random(2, 5, 3, dtype=torch.float64)

        def function(packed):
            shift, scale, gate = chunks(packed, 3)
            y = gated_residual(x, x, gate)
            return norm_modulate(y, x[0, 0], shift, scale, EPS) * norm_modulate(y, x[0, 1], shift, scale, EPS)

        assert torch.autograd.gradcheck(function, (random(2, 5, 9, dtype=torch.float64).requires_grad_(),))

    def test_chunks_that_nothing_read_have_no_gradient(self, random):
        packed = random(2, 5, 12).requires_grad_()
        chunks(packed, 4)[1].sum().backward()
        assert packed.grad.sum() == 2 * 5 * 3

    def test_gradient_is_where_the_operators_wrote_it(self, random, monkeypatch):
        packed, x = random(2, 5, 9).requires_grad_(), random(2, 5, 3)

        def forbidden(*args, **kwargs):
            raise AssertionError("a copy put the gradient together")

        shift, scale, gate = chunks(packed, 3)
        out = gated_residual(norm_modulate(x, torch.ones(3), shift, scale, EPS), x, gate)
        monkeypatch.setattr(torch, "cat", forbidden)
        (gradient,) = torch.autograd.grad(out.sum(), packed)
        assert gradient.is_contiguous() and gradient.isfinite().all()

    def test_nothing_keeps_the_packed_tensor_or_its_gradient(self, random):
        packed = random(2, 5, 6).requires_grad_()
        doubled = packed * 2
        shift, scale = chunks(doubled, 2)
        (shift.sum() + scale.sum()).backward()
        storages = [StorageWeakRef(doubled.untyped_storage())]
        del doubled, shift, scale
        assert storages[0].expired()

        doubled = packed * 2
        doubled.register_hook(lambda gradient: storages.append(StorageWeakRef(gradient.untyped_storage())))
        out = norm_modulate(random(2, 5, 3), torch.ones(3), *chunks(doubled, 2), EPS)
        torch.autograd.grad(out.sum(), packed)
        del out, doubled
        assert len(storages) == 2 and storages[1].expired()

    def test_inside_activation_checkpointing(self, random, monkeypatch):
        """Forward keeps nothing of the packed tensor, and backward finds the gradients in place all the same."""
        packed, x = random(2, 5, 6).requires_grad_(), random(2, 5, 3)
        made = []

        def function(packed):
            made.append(StorageWeakRef((doubled := packed * 2).untyped_storage()))
            return norm_modulate(x, torch.ones(3), *chunks(doubled, 2), EPS)

        (expected,) = torch.autograd.grad(function(packed).sum(), packed)
        made.clear()
        out = checkpoint(function, packed, use_reentrant=False)
        assert made[0].expired()
        monkeypatch.setattr(torch, "cat", None)
        assert torch.equal(torch.autograd.grad(out.sum(), packed)[0], expected)

    def test_second_backward_over_one_graph(self, random):
        packed, x = random(2, 5, 12).requires_grad_(), random(2, 5, 3)
        out = self.function(packed, x).sum()
        first = torch.autograd.grad(out, packed, retain_graph=True)[0].clone()
        assert torch.equal(torch.autograd.grad(out, packed)[0], first)


def test_kernels_on_demand_are_never_replaced(random):
    with use("triton"), pytest.raises(ValueError, match=r"RAE_KERNELS=triton.*TRITON_INTERPRET"):
        rms_norm(random(2, 8), random(8), EPS)
    with pytest.raises(ValueError, match="names no implementation"), rae_kernels.use("fast"):
        pass
