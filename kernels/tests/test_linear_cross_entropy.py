"""Cross-entropy of an output layer in chunks: the same loss and gradients, and never all logits."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rae_kernels
from rae_kernels import linear_cross_entropy

module = sys.modules["rae_kernels.linear_cross_entropy"]

ROWS, WIDTH, VOCAB = 23, 6, 50
CHUNK = 5  # rows


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "LOGITS_BYTES", CHUNK * VOCAB * 4 + 3)


def arguments(dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(WIDTH, VOCAB, dtype=dtype)
    targets = torch.randint(VOCAB, (ROWS,))
    targets[::4] = -100
    return layer, torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True), targets


class Sizes(TorchDispatchMode):
    """The most elements of any tensor that an operator gives."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def kept_bytes(function: Any) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


@pytest.mark.parametrize("rows", [ROWS, CHUNK, 2 * CHUNK, 1])
def test_loss_and_gradients_are_those_of_all_logits(rows):
    layer, hidden, targets = arguments()
    hidden, targets = hidden[:rows], targets[:rows]
    loss = linear_cross_entropy(layer, hidden, targets, VOCAB)
    expected = torch.nn.functional.cross_entropy(layer(hidden).float(), targets, reduction="sum")
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected)
    inputs = [hidden, *layer.parameters()]
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_gradcheck():
    layer, hidden, targets = arguments()
    weight = layer.weight.detach().requires_grad_()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        product = lambda x: torch.nn.functional.linear(x, weight)  # noqa: E731
        return linear_cross_entropy(product, hidden, targets, VOCAB, double_cross_entropy)

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def double_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def test_only_a_chunk_of_logits_exists_at_a_time():
    layer, hidden, targets = arguments()
    with Sizes() as sizes:
        linear_cross_entropy(layer, hidden, targets, VOCAB).backward()
    assert sizes.largest == max(CHUNK * VOCAB, VOCAB * WIDTH)
    with Sizes() as sizes, rae_kernels.use("reference"):
        linear_cross_entropy(layer, hidden, targets, VOCAB).backward()
    assert sizes.largest == ROWS * VOCAB, "the reference is the plain function"


def test_forward_keeps_no_logits():
    layer, hidden, targets = arguments(torch.float32)
    inputs = sum(x.numel() * x.element_size() for x in (hidden, layer.weight, layer.bias, targets))
    assert kept_bytes(lambda: linear_cross_entropy(layer, hidden, targets, VOCAB)) <= inputs + 100
    with rae_kernels.use("reference"):
        assert kept_bytes(lambda: linear_cross_entropy(layer, hidden, targets, VOCAB)) > ROWS * VOCAB * 4


def test_rows_that_fit_are_computed_once():
    layer, hidden, targets = arguments()
    calls = []
    watched = lambda x: calls.append(len(x)) or layer(x)  # noqa: E731
    linear_cross_entropy(watched, hidden[:CHUNK], targets[:CHUNK], VOCAB).backward()
    assert calls == [CHUNK]
    calls.clear()
    linear_cross_entropy(watched, hidden[: 2 * CHUNK], targets[: 2 * CHUNK], VOCAB).backward()
    assert calls == [CHUNK] * 4


def test_chunks_follow_the_whole_vocabulary():
    """Slices of it may differ by a row; processes that took chunks by their slice would wait for each other."""
    layer, hidden, targets = arguments()
    calls = []
    linear_cross_entropy(lambda x: calls.append(len(x)) or layer(x), hidden, targets, 2 * VOCAB)
    assert calls == [CHUNK // 2] * 11 + [1]


def test_a_row_wider_than_a_chunk_is_one():
    assert module.rows_per_chunk(10**9) == 1


def test_autocast_reaches_the_second_pass():
    layer, hidden, targets = arguments(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(layer, hidden, targets, VOCAB)
        with rae_kernels.use("reference"):
            expected = linear_cross_entropy(layer, hidden, targets, VOCAB)
    ours, theirs = torch.autograd.grad(loss, hidden)[0], torch.autograd.grad(expected, hidden)[0]
    torch.testing.assert_close(loss, expected)
    assert torch.equal(ours, theirs)
