"""Selective activation checkpointing: outputs that are written to, that are sent, and that do not match."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rae_scale.parallel import apply_activation_checkpointing
from tests.parallel.checkpointed import EVERYTHING, Watch, assert_same_bits, gradients


class AddsInPlace(torch.autograd.Function):
    """The linear layer that DeepSpeed's stage 3 puts in place of torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = x.matmul(weight.t())
        y += bias
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x, gradient.sum(0)


def blocks(*functions: Callable[[nn.Linear, Tensor], Tensor]) -> nn.Module:
    """A model of one block per function, which gets a linear layer to use."""

    class FunctionBlock(nn.Module):
        def __init__(self, function: Callable[[nn.Linear, Tensor], Tensor]) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(self.linear, x)

    class FunctionModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(FunctionBlock(function) for function in functions)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    return FunctionModel()


def check_bits(function: Callable[[nn.Linear, Tensor], Tensor], saved_ops: dict[str, int] = EVERYTHING) -> None:
    model = blocks(function, function)
    x = torch.randn(3, 4, requires_grad=True)
    expected = gradients(model, x)
    apply_activation_checkpointing(model, "selective", saved_ops)
    assert_same_bits(gradients(model, x), expected)


@pytest.mark.parametrize("saved_ops", [{}, {"linear": 1}, {"linear": 2}], ids=str)
def test_a_kept_output_that_is_written_to_is_kept_as_it_was(saved_ops: dict[str, int]) -> None:
    check_bits(lambda linear, x: AddsInPlace.apply(x, linear.weight, linear.bias), saved_ops)
    check_bits(lambda linear, x: linear(x).sin_() * linear(x).mul_(2.0), saved_ops)


def test_a_product_into_a_given_tensor_runs_again() -> None:
    class IntoBuffer(AddsInPlace):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            y = torch.empty(len(x), len(weight))
            torch.addmm(bias, x, weight.t(), out=y)
            return y

    check_bits(lambda linear, x: IntoBuffer.apply(x, linear.weight, linear.bias).sin())


def test_a_block_may_be_called_twice_under_autocast() -> None:
    """Only the first call casts the weights, but each call's second run does it again."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4), nn.SiLU())])

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.blocks[0](self.blocks[0](x))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(3, 4, requires_grad=True)
    expected = gradients(model, x)
    apply_activation_checkpointing(model, "selective", {"linear": 1})
    assert_same_bits(gradients(model, x), expected)


def test_a_kept_output_written_to_after_the_block_is_an_error() -> None:
    outside = []

    def leaks(linear: nn.Linear, x: Tensor) -> Tensor:
        outside.append(linear(x))
        return outside[-1].sin()

    model = blocks(leaks)
    apply_activation_checkpointing(model, "selective", {"linear": 1})
    loss = model(torch.randn(3, 4)).sum()
    outside[0].detach().mul_(2.0)
    with pytest.raises(RuntimeError, match=r"written to after its block had ended.*activation_checkpointing=full"):
        loss.backward()


def test_backward_twice_is_an_error() -> None:
    model = blocks(lambda linear, x: linear(x).sin())
    apply_activation_checkpointing(model, "selective", {"linear": 1})
    loss = model(torch.randn(3, 4)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"backward went through this block before.*activation_checkpointing=full"):
        loss.backward()


def test_a_block_that_computes_something_else_in_backward_is_an_error() -> None:
    runs = []

    def changes(linear: nn.Linear, x: Tensor) -> Tensor:
        runs.append(None)
        return (x @ linear.weight if len(runs) > 1 else linear(x)).sin()

    model = blocks(changes)
    apply_activation_checkpointing(model, "selective", {"linear": 1})
    loss = model(torch.randn(3, 4)).sum()
    with pytest.raises(RuntimeError, match=r"backward ran aten.mm.default where .* had run aten.addmm.default"):
        loss.backward()


@pytest.fixture
def one_rank() -> Iterator[str]:
    """The name of a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@pytest.mark.parametrize("budget", [0, 1, 3, -1])
def test_kept_communication_is_not_repeated(one_rank: str, budget: int) -> None:
    functional = torch.ops._c10d_functional

    class Gathered(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            x = functional.wait_tensor(functional.all_gather_into_tensor(x, 1, one_rank).view(x.shape))
            x = functional.wait_tensor(functional.reduce_scatter_tensor(x, "sum", 1, one_rank))
            x = functional.wait_tensor(functional.all_to_all_single(x, [len(x)], [len(x)], one_rank))
            x = functional.wait_tensor(functional.all_reduce(x, "sum", one_rank))
            x += 1.0
            return x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    def function(linear: nn.Linear, x: Tensor) -> Tensor:
        return Gathered.apply(linear(x)).sin()

    check_bits(function, {"communication": budget})
    model = blocks(function)
    watch = Watch(model)
    apply_activation_checkpointing(model, "selective", {"communication": budget})
    with watch:
        loss = model(torch.randn(3, 4)).sum()
        watch.counts.clear()
        loss.backward()
    assert watch.counts["communication"] == (0 if budget == -1 else 4 - budget)
    assert watch.counts["linear"] == 1


def test_it_works_below_fully_shard(one_rank: str) -> None:
    model = blocks(*2 * [lambda linear, x: linear(linear(x).sin()).cos()])
    x = torch.randn(3, 4, requires_grad=True)
    expected = gradients(model, x)
    apply_activation_checkpointing(model, "selective", {"linear": 1})
    for unit in [*model.blocks, model]:
        fully_shard(unit, mesh=init_device_mesh("cpu", (1,)))
    *ours, of_input = gradients(model, x)
    assert_same_bits([*(gradient.full_tensor() for gradient in ours), of_input], expected)
