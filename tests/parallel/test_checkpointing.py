from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rae_scale import ops
from rae_scale.models.blocks import DiTBlock, Rope
from rae_scale.parallel import apply_activation_checkpointing, blocks_of
from tests.parallel.checkpointed import EVERYTHING, Watch, assert_same_bits, gradients

LINEAR_CALLS = 5
"""Of a DiTBlock: its condition, qkv, proj, and the two of its SwiGLU."""
BUDGETS = [
    {"linear": 0},
    {"linear": 2},
    {"attention": 1},
    {"linear": 2, "attention": -1},
    {"linear": LINEAR_CALLS + 1, "attention": 7},
    EVERYTHING,
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return x + scale * self.linear(x).sin()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.llm = nn.ModuleDict({"layers": nn.ModuleList([Block()])})

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.llm["layers"]]:
            x = block(x, scale=0.5)
        return x


class Denoiser(nn.Module):
    """Two blocks of the real model, with every gate open."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(48, 4, 48, qk_norm=True, attention=ops.attention) for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor, rope: Rope) -> Tensor:
        for block in self.blocks:
            x = block(x, condition, rope)
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    denoiser = Denoiser()
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    return denoiser


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Rope]:
    torch.manual_seed(1)
    angles = torch.randn(6, 12)
    return torch.randn(2, 6, 48), torch.randn(2, 6, 48, requires_grad=True), Rope(angles.cos(), angles.sin())


def precision(name: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16")


def test_blocks_are_those_of_every_list_of_blocks(model: Model) -> None:
    assert blocks_of(model) == [*model.blocks, *model.llm["layers"]]


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Linear has no list of blocks.*one of blocks, layers"):
        apply_activation_checkpointing(nn.Linear(2, 2), "full", {})


def test_mode_none_leaves_blocks_alone(model: Model) -> None:
    apply_activation_checkpointing(model, "none", {})
    model(torch.randn(3, 4)).sum().backward()
    assert [block.calls for block in blocks_of(model)] == [1, 1, 1]


@pytest.mark.parametrize(("mode", "saved_ops"), [("full", {}), ("selective", EVERYTHING)])
def test_blocks_run_again_in_backward_and_gradients_stay_bitwise(
    model: Model, mode: str, saved_ops: dict[str, int]
) -> None:
    plain = copy.deepcopy(model)
    x = torch.randn(3, 4)
    apply_activation_checkpointing(model, mode, saved_ops)
    loss = model(x).square().sum()
    assert [block.calls for block in blocks_of(model)] == [1, 1, 1]
    loss.backward()
    assert [block.calls for block in blocks_of(model)] == [2, 2, 2]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert_same_bits([parameter.grad for parameter in model.parameters()], gradients(plain, x))


def test_without_gradients_nothing_is_checkpointed(model: Model) -> None:
    apply_activation_checkpointing(model, "selective", EVERYTHING)
    with torch.no_grad():
        model(torch.randn(3, 4))
    assert [block.calls for block in blocks_of(model)] == [1, 1, 1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("saved_ops", BUDGETS, ids=str)
def test_the_real_block_repeats_what_is_beyond_the_budget_and_nothing_else(
    denoiser: Denoiser, inputs: tuple[Tensor, Tensor, Rope], saved_ops: dict[str, int], dtype: str
) -> None:
    with precision(dtype):
        expected = gradients(denoiser, *inputs)
    watch = Watch(denoiser)
    apply_activation_checkpointing(denoiser, "selective", saved_ops)
    with watch:
        with precision(dtype):
            loss = denoiser(*inputs).float().square().sum()
        calls = {"linear": 2 * LINEAR_CALLS, "attention": 2}
        assert {kind: watch.counts[kind] for kind in calls} == calls
        watch.counts.clear()
        loss.backward()
    for kind, count in calls.items():
        budget = saved_ops.get(kind, 0)
        kept = count if budget == -1 else min(2 * budget, count)
        assert watch.counts[kind] == count - kept, kind
    assert_same_bits([*(p.grad for p in denoiser.parameters()), inputs[1].grad], expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_held_until_backward_lies_between_full_and_none_and_grows_with_the_budget(
    denoiser: Denoiser, inputs: tuple[Tensor, Tensor, Rope], dtype: str
) -> None:
    def held(mode: str, saved_ops: dict[str, int]) -> int:
        model = copy.deepcopy(denoiser)
        watch = Watch(model)
        apply_activation_checkpointing(model, mode, saved_ops)
        with watch, precision(dtype):
            output = model(*inputs)
        before = watch.held_bytes()
        with watch:
            output.float().square().sum().backward()
        del output
        assert watch.held_bytes() == 0
        return before

    budgets = [*({"linear": count} for count in range(LINEAR_CALLS + 1)), {"linear": -1, "attention": -1}]
    sizes = [held("full", {}), *(held("selective", budget) for budget in budgets), held("none", {})]
    assert sizes[0] == sizes[1]
    assert sizes[1:] == sorted(set(sizes[1:]))
    # Two blocks, twelve tokens: the first product is the condition's, of 6 x 48 channels.
    assert sizes[2] - sizes[1] == 2 * 12 * 6 * 48 * (2 if dtype == "bf16" else 4)
