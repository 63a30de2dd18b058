"""SwiGLU without Triton: values, one rounding, gradients, operator rules, and what `swiglu_into` keeps for backward."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae_kernels import use
from rae_kernels.swiglu import (
    swiglu,
    swiglu_into,
    swiglu_packed,
    swiglu_packed_backward,
    swiglu_pair,
    swiglu_separate,
    swiglu_separate_backward,
)


@pytest.fixture(params=["auto", "reference"])
def implementation(request):
    with use(request.param):
        yield


@pytest.mark.usefixtures("implementation")
def test_the_gate_comes_first(random):
    gate, value = random(3, 5, dtype=torch.float64), random(3, 5, dtype=torch.float64)
    expected = gate / (1 + torch.exp(-gate)) * value
    torch.testing.assert_close(swiglu(torch.cat((gate, value), dim=-1)), expected)
    torch.testing.assert_close(swiglu_pair(gate, value), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once(dtype, random):
    packed = (2 * random(64, 2 * 171)).to(dtype).requires_grad_()
    gradient, exact_input = random(64, 171, dtype=dtype), packed.detach().double().requires_grad_()
    ours = swiglu(packed)
    with use("reference"):
        exact = swiglu(exact_input)
    ours.backward(gradient)
    exact.backward(gradient.double())
    for result, expected in ((ours, exact), (packed.grad, exact_input.grad)):
        assert result.dtype == dtype
        one_rounding = torch.finfo(dtype).eps / 2 * expected.abs() * 1.01 + 1e-6
        assert ((result.double() - expected).abs() <= one_rounding).all()


@pytest.mark.usefixtures("implementation")
def test_gradients(random):
    gate, value = (random(2, 3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate,))
    assert torch.autograd.gradcheck(swiglu_pair, (gate, value))


def test_operators_keep_the_rules_of_pytorch(random):
    x, y = random(2, 3, 8).requires_grad_(), random(2, 3, 8).requires_grad_()
    across = random(2, 8, 3).transpose(1, 2)
    check = torch.library.opcheck
    check(swiglu_packed, (x,))
    check(swiglu_packed, (across,))
    check(swiglu_packed_backward, (across[..., :4], across))
    check(swiglu_separate, (x, y))
    check(swiglu_separate_backward, (across, across, y.detach()))


def test_arguments_that_do_not_fit(random):
    with pytest.raises(ValueError, match=r"\[2, 5\].*even"):
        swiglu(random(2, 5))
    with pytest.raises(ValueError, match=r"value is torch.float32 \[2, 1\]"):
        swiglu_pair(random(2, 4), random(2, 1))
    with pytest.raises(ValueError, match=r"torch.bfloat16 \[2, 4\]"):
        swiglu_pair(random(2, 4), random(2, 4).bfloat16())


class FlatLinear(torch.autograd.Function):
    """As tensor-parallel layers do it: flattens its input, keeps it, and does both products by itself."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        ctx.save_for_backward(flat, weight)
        return (flat @ weight.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        flat, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).T @ flat


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def flattened(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)


def with_bias(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight, weight[:, 0])


Layer = Callable[[Tensor, Tensor], Tensor]


class Run:
    """packed -> activation -> layer, by `call`; afterwards: the result, gradients, and whether the activation lived."""

    def __init__(self, call: Callable[..., Tensor], packed: Tensor, weight: Tensor, layer: Layer) -> None:
        self.activation: weakref.ref | None = None

        def watched(x: Tensor) -> Tensor:
            self.activation = weakref.ref(x.untyped_storage())
            return layer(x, weight)

        packed, weight = packed.detach().requires_grad_(), weight.detach().requires_grad_()
        out = call(packed * 1, watched)
        self.kept = self.activation() is not None
        self.results = (out.detach(), *torch.autograd.grad(out.square().sum(), (packed, weight)))


def keep_activation(packed: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    return layer(swiglu(packed))


@pytest.mark.parametrize("layer", [linear, flattened, with_bias, FlatLinear.apply])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_is_formed_again_to_the_same_bits(dtype, layer, random):
    packed, weight = random(2, 3, 24, dtype=dtype), random(5, 12, dtype=dtype)
    ours, expected = Run(swiglu_into, packed, weight, layer), Run(keep_activation, packed, weight, layer)
    assert expected.kept, "the test can tell"
    assert not ours.kept
    assert all(torch.equal(a, b) for a, b in zip(ours.results, expected.results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype, random):
    """In bfloat16 as elsewhere; a copy in another type is kept, and is right."""
    packed, weight = random(2, 3, 24, dtype=dtype), random(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, expected = Run(swiglu_into, packed, weight, linear), Run(keep_activation, packed, weight, linear)
    assert not ours.kept
    assert all(torch.equal(a, b) for a, b in zip(ours.results, expected.results, strict=True))


def test_only_the_whole_activation_is_formed_again(random):
    """Other tensors that the layer keeps, even parts of the activation, are kept as they are."""

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        first, second = x.flatten(0, -2).split(2)
        hidden = torch.tanh(torch.cat((first @ weight.T, second @ weight.T)))
        return hidden * hidden.exp() + (x.transpose(0, 1) @ weight.T).sum() + x.transpose(-1, -2).pow(2).sum()

    packed, weight = random(1, 4, 24), random(5, 12)
    ours, expected = Run(swiglu_into, packed, weight, layer), Run(keep_activation, packed, weight, layer)
    assert ours.kept
    assert all(torch.equal(a, b) for a, b in zip(ours.results, expected.results, strict=True))


def test_memory_is_let_go_with_the_graph(random):
    """Also that of a result which backward needs: nothing refers to itself."""
    packed, weight = random(2, 3, 24).requires_grad_(), random(5, 12).requires_grad_()
    gc.disable()
    try:
        out = swiglu_into(packed * 1, lambda x: F.linear(x, weight).exp())
        storage = weakref.ref(out.untyped_storage())
        del out
        assert storage() is None
    finally:
        gc.enable()


def test_parameters_whose_values_are_away_in_between(random):
    """As ZeRO-3 does: gathered for the layer, let go, gathered again for its backward."""
    packed, parameter = random(2, 3, 24).requires_grad_(), nn.Parameter(random(5, 12))
    expected = torch.autograd.grad(linear(swiglu(packed), parameter).square().sum(), (packed, parameter))
    out = swiglu_into(packed, lambda x: FlatLinear.apply(x, parameter)).square().sum()
    values, gathered = parameter.detach().clone(), weakref.ref(parameter.untyped_storage())
    parameter.data = torch.empty(0)
    assert gathered() is None, "the graph holds what was gathered"
    parameter.data = values
    ours = torch.autograd.grad(out, (packed, parameter))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_nothing_is_kept_for_a_projection_that_is_not_trained(random):
    """Keeping `packed`, which nobody else would, instead of the activation would cost twice the memory."""
    packed, layer = random(2, 3, 24), nn.Linear(12, 5, bias=False)
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(weakref.ref(x.untyped_storage()))
        return layer(x)

    out = swiglu_into(packed, watched)
    assert seen[0]() is not None
    out.sum().backward()
    torch.testing.assert_close(layer.weight.grad, swiglu(packed).sum((0, 1)).expand(5, 12))


def test_without_gradients_the_layer_is_just_called(random, monkeypatch):
    def forbidden(*args):
        raise AssertionError("hooks were installed")

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", forbidden)
    packed, layer = random(2, 3, 24).requires_grad_(), nn.Linear(12, 5)
    with torch.no_grad():
        assert torch.equal(swiglu_into(packed, layer), layer(swiglu(packed)))
    with use("reference"):
        assert torch.equal(swiglu_into(packed, layer), layer(swiglu(packed)))
    with pytest.raises(AssertionError, match="hooks"):
        swiglu_into(packed, layer)


def test_activation_checkpointing_sees_all_that_is_kept(random):
    """It replaces what is kept by nothing; a hook inside would have hidden `packed` from it."""
    x, first, second = random(2, 3, 6).requires_grad_(), nn.Linear(6, 24), nn.Linear(12, 5)
    seen = []

    def block(x: Tensor) -> Tensor:
        packed = first(x)
        seen.append(weakref.ref(packed.untyped_storage()))
        return swiglu_into(packed, second)

    out = checkpoint(block, x, use_reentrant=False)
    assert seen[0]() is None
    parameters = (x, *first.parameters(), *second.parameters())
    ours = torch.autograd.grad(out.square().sum(), parameters)
    expected = torch.autograd.grad(second(swiglu(first(x))).square().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_compiles_without_a_graph_break(random):
    packed, layer = random(2, 3, 24).requires_grad_(), nn.Linear(12, 5)
    expected = torch.autograd.grad(swiglu_into(packed, layer).square().sum(), packed)[0]
    for choice in ("auto", "reference"):
        torch._dynamo.reset()
        with use(choice):
            compiled = torch.compile(lambda x: swiglu_into(x, layer), fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(torch.autograd.grad(compiled(packed).square().sum(), packed)[0], expected)
