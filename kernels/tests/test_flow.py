"""Flow matching with noise drawn inside: the formulas with `philox_normal`, their gradient, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import rae_kernels
from rae_kernels import flow_operators, philox_normal
from rae_kernels.flow import flow_interpolate, flow_matching_loss
from rae_kernels.spec import flow as spec

B, T, C = 3, 6, 10
INDEX = torch.tensor([5, 2**40 + 1, 5 + 2**32])
NOISE = {"seed": 2**64 - 3, "step": 2**32 - 1, "sample_index": INDEX, "stream": 2**16 - 1}
SIGNED_NOISE = (INDEX, -3, 2**32 - 1, 2**16 - 1)

CHOICES = pytest.mark.parametrize("choice", ["auto", "reference"])


def eps(dtype: torch.dtype = torch.float32) -> Tensor:
    return philox_normal(NOISE["seed"], NOISE["step"], INDEX, (T, C), NOISE["stream"]).to(dtype)


@CHOICES
def test_the_path_holds_the_noise_of_philox_normal(random, choice):
    x, t = random(B, T, C), torch.tensor([0.0, 0.3, 1.0])
    with rae_kernels.use(choice):
        x_t = flow_interpolate(x, t, **NOISE)
    assert torch.equal(x_t, (1 - t)[:, None, None] * x + t[:, None, None] * eps())
    assert torch.equal(x_t[0], x[0]) and torch.equal(x_t[2], eps()[2])


@CHOICES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_path_is_rounded_once(random, choice, dtype):
    x, t = random(B, T, C, dtype=dtype), torch.rand(B)
    with rae_kernels.use(choice):
        x_t = flow_interpolate(x, t, **NOISE)
    assert torch.equal(x_t, flow_interpolate(x.float(), t, **NOISE).to(dtype))


@CHOICES
@pytest.mark.parametrize(("first", "last"), [(0, T), (0, 3), (3, 6), (1, 2)])
def test_the_loss_is_the_mean_over_the_tokens_given(random, choice, first, last):
    x, velocity, weight = random(B, T, C), random(B, last - first, C), torch.tensor([1.0, 0.0, 0.25])
    with rae_kernels.use(choice):
        loss = flow_matching_loss(velocity, x, **NOISE, first_token=first, weight=weight)
        unweighted = flow_matching_loss(velocity, x, **NOISE, first_token=first)
    target = (eps() - x)[:, first:last]
    expected = (velocity - target).square().flatten(1).mean(dim=1)
    assert loss.dtype == torch.float32
    assert torch.equal(unweighted, expected) and torch.equal(loss, expected * weight)


def test_slices_add_up_to_the_whole(random):
    """As with sequence parallelism, where no rank's first element need begin a counter's four numbers."""
    x, velocity = random(B, T, C), random(B, T, C)
    whole = flow_matching_loss(velocity, x, **NOISE)
    parts = [flow_matching_loss(velocity[:, i : i + 1], x, **NOISE, first_token=i) / T for i in range(T)]
    torch.testing.assert_close(sum(parts), whole)


def test_the_gradient_is_that_of_the_reference(random):
    x, weight, for_loss = random(B, T, C), torch.tensor([2.0, 0.0, 0.5]), torch.tensor([1.0, 3.0, -0.7])
    gradients = {}
    for choice in ("auto", "reference"):
        velocity = torch.linspace(-2, 2, B * 2 * C).view(B, 2, C).requires_grad_()
        with rae_kernels.use(choice):
            flow_matching_loss(velocity, x, **NOISE, first_token=3, weight=weight).backward(for_loss)
        gradients[choice] = velocity.grad
    torch.testing.assert_close(gradients["auto"], gradients["reference"], rtol=1e-6, atol=0)
    assert gradients["auto"][0].any() and not gradients["auto"][1].any()


def test_the_weight_has_a_gradient(random):
    x, velocity, weight = random(B, T, C), random(B, T, C), torch.ones(B, requires_grad=True)
    loss = flow_matching_loss(velocity, x, **NOISE, weight=weight)
    assert torch.equal(torch.autograd.grad(loss.sum(), weight)[0], loss.detach())


@CHOICES
def test_gradcheck(random, choice):
    x, velocity = random(B, T, C, dtype=torch.float64), random(B, 2, C, dtype=torch.float64).requires_grad_()

    def loss(velocity: Tensor) -> Tensor:
        return flow_matching_loss(velocity, x, **NOISE, first_token=1, weight=torch.tensor([1.0, 2.0, 0.5]))

    with rae_kernels.use(choice):
        assert torch.autograd.gradcheck(loss, velocity)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_gradients_are_rounded_once(random, dtype):
    x = random(1, 256, 64)
    noise = {"seed": 0, "step": 0, "sample_index": torch.tensor([1]), "stream": 0}
    velocity = random(1, 256, 64, dtype=dtype).requires_grad_()
    exact = velocity.detach().double().requires_grad_()
    loss, expected = (flow_matching_loss(v, x, **noise, weight=torch.tensor([2.0**16])) for v in (velocity, exact))
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=0)
    loss.sum().backward()
    expected.sum().backward()
    assert velocity.grad.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(velocity.grad.double(), exact.grad, rtol=1.01 * rounding, atol=0)


def test_autocast_changes_nothing(random):
    x, velocity, t = random(B, T, C), random(B, T, C, dtype=torch.bfloat16), torch.rand(B)
    with torch.autocast("cpu", torch.bfloat16):
        loss, x_t = flow_matching_loss(velocity, x, **NOISE), flow_interpolate(x, t, **NOISE)
    assert torch.equal(loss, flow_matching_loss(velocity, x, **NOISE))
    assert torch.equal(x_t, flow_interpolate(x, t, **NOISE))


def test_nothing_is_kept_where_no_gradient_is_needed(random, monkeypatch):
    kept = []

    def operator(*args: object) -> tuple[Tensor, Tensor]:
        result = flow_operator(*args)
        kept.append(result[1].numel())
        return result

    flow_operator = flow_operators.flow_matching_loss
    monkeypatch.setattr(flow_operators, "flow_matching_loss", operator)
    x, velocity = random(B, T, C), random(B, T, C)
    flow_matching_loss(velocity, x, **NOISE)
    velocity.requires_grad_()
    with torch.no_grad():
        flow_matching_loss(velocity, x, **NOISE)
    flow_matching_loss(velocity, x, **NOISE)
    assert kept == [0, 0, velocity.numel()]


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("flow_interpolate", lambda v, x: (x, torch.rand(B), *SIGNED_NOISE)),
        ("flow_matching_loss", lambda v, x: (v, x, *SIGNED_NOISE, 2, True)),
        (
            "flow_matching_loss",
            lambda v, x: (v.detach().transpose(0, 1).contiguous().transpose(0, 1), x, *SIGNED_NOISE, 2, True),
        ),
        ("flow_matching_loss", lambda v, x: (v.detach(), x, *SIGNED_NOISE, 0, False)),
        ("flow_matching_loss_backward", lambda v, x: (torch.rand(B), v.detach().float(), torch.bfloat16)),
    ],
)
def test_opcheck(random, operator, arguments):
    velocity = random(B, 3, C, dtype=torch.bfloat16).requires_grad_()
    torch.library.opcheck(getattr(flow_operators, operator), arguments(velocity, random(B, T, C)))


def test_compiled_training_equals_eager(random):
    x, velocity, t = random(B, T, C), random(B, T, C).requires_grad_(), torch.rand(B)

    def step(velocity: Tensor) -> Tensor:
        x_t = flow_interpolate(x, t, **NOISE)
        return flow_matching_loss(velocity * x_t, x, **NOISE).sum()

    (expected,) = torch.autograd.grad(step(velocity), velocity)
    (found,) = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(velocity), velocity)
    assert torch.equal(found, expected)


def test_no_matrix_product_is_counted(random):
    x, velocity = random(B, T, C), random(B, T, C).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        flow_interpolate(x, torch.rand(B), **NOISE)
        flow_matching_loss(velocity, x, **NOISE).sum().backward()
    assert counter.get_total_flops() == 0


@CHOICES
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed="),
        ({"step": 2**32}, "step="),
        ({"stream": 2**16}, "stream="),
        ({"sample_index": INDEX.int()}, r"int64 \[3\]"),
        ({"sample_index": INDEX[:1]}, r"int64 \[3\]"),
        ({"x": torch.zeros(B, T, C, requires_grad=True)}, "x requires a gradient.*x.detach"),
        ({"x": torch.zeros(B, T * C)}, r"\[B, T, C\]"),
    ],
)
def test_what_is_refused_of_both(random, choice, change, message):
    x, velocity, t = random(B, T, C), random(B, T, C), torch.rand(B)
    arguments = {"x": x} | NOISE | change
    with rae_kernels.use(choice):
        with pytest.raises(ValueError, match=message):
            flow_matching_loss(velocity, **arguments)
        with pytest.raises(ValueError, match=message):
            flow_interpolate(t=t, **arguments)


@pytest.mark.parametrize(
    ("shape", "first", "message"),
    [
        ((B, T, C), 1, "first_token=1"),
        ((B, 2, C), -1, "first_token=-1"),
        ((B, T + 1, C), 0, "7 tokens"),
        ((B, T, C + 1), 0, r"\[3, P, 10\]"),
        ((1, T, C), 0, r"\[3, P, 10\]"),
    ],
)
def test_a_velocity_of_other_tokens_is_refused(random, shape, first, message):
    with pytest.raises(ValueError, match=message):
        flow_matching_loss(random(*shape), random(B, T, C), **NOISE, first_token=first)


def test_one_number_per_sample(random):
    x = random(B, T, C)
    with pytest.raises(ValueError, match="t is"):
        flow_interpolate(x, torch.rand(1), **NOISE)
    with pytest.raises(ValueError, match="weight is"):
        flow_matching_loss(x, x, **NOISE, weight=torch.rand(B, 1))


def test_the_slope_of_an_empty_batch():
    empty = torch.zeros(0, T, C)
    assert spec.mean_square_backward(torch.zeros(0), empty, torch.float32).shape == empty.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("tokens", "channels", "first"), [(256, 1152, 0), (256, 1152, 128), (40, 73, 17)])
def test_the_kernels_on_a_gpu_equal_the_specification(random, tokens, channels, first):
    x, t = random(B, tokens, channels).cuda(), torch.tensor([0.0, 0.3, 1.0]).cuda()
    velocity = random(B, tokens - first, channels).cuda().requires_grad_()
    noise = NOISE | {"sample_index": INDEX.cuda()}
    results = []
    for choice in ("triton", "reference"):
        with rae_kernels.use(choice):
            loss = flow_matching_loss(velocity, x, **noise, first_token=first)
            results.append((flow_interpolate(x, t, **noise), loss, *torch.autograd.grad(loss.sum(), velocity)))
    for found, expected in zip(*results, strict=True):
        error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error < 1e-5
