from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rae_scale.parallel import apply_activation_checkpointing, blocks_of


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


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def test_blocks_are_those_of_every_list_of_blocks(model: Model) -> None:
    assert blocks_of(model) == [*model.blocks, *model.llm["layers"]]


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Linear has no list of blocks.*one of blocks, layers"):
        apply_activation_checkpointing(nn.Linear(2, 2))


def test_blocks_run_again_in_backward_and_gradients_stay_bitwise(model: Model) -> None:
    plain = copy.deepcopy(model)
    x = torch.randn(3, 4)
    plain(x).square().sum().backward()

    apply_activation_checkpointing(model)
    loss = model(x).square().sum()
    assert [block.calls for block in blocks_of(model)] == [1, 1, 1]
    loss.backward()
    assert [block.calls for block in blocks_of(model)] == [2, 2, 2]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_without_gradients_nothing_is_checkpointed(model: Model) -> None:
    apply_activation_checkpointing(model)
    with torch.no_grad():
        model(torch.randn(3, 4))
    assert [block.calls for block in blocks_of(model)] == [1, 1, 1]
