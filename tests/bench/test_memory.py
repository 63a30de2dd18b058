"""Bytes alive after forward, on graphs small enough to count by hand."""

from __future__ import annotations

import torch
from torch import nn

from rae_scale.bench.memory import alive_after, allocated_after


def test_what_backward_needs_is_alive_and_the_rest_is_not() -> None:
    x = torch.randn(10, 100, requires_grad=True)  # 4000 bytes, made before: not counted

    def forward() -> torch.Tensor:
        kept = x.exp()  # needs its own result: 4000
        passing = kept + 1  # needs nothing, and nobody holds it
        return (passing * 2).sum()  # 4

    assert alive_after(forward) == (4004, 0)


def test_a_view_counts_once_and_inputs_not_at_all() -> None:
    x = torch.randn(8, 8, requires_grad=True)

    def forward() -> torch.Tensor:
        made = x.sigmoid()  # 256
        return (made[:4].square() + made[4:].square() + x[:4]).sum()  # both views are kept, one memory

    assert alive_after(forward) == (256 + 4, 0)


def test_casts_of_weights_are_told_apart() -> None:
    layer, batch = nn.Linear(64, 32, bias=False), 16
    x = torch.randn(batch, 64, requires_grad=True)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    found = alive_after(forward, layer.parameters())
    assert found.weight_copies == 64 * 32 * 2
    assert found.activations == batch * 64 * 2 + batch * 32 * 2  # the cast input, and the result


def test_checkpointing_leaves_less_behind() -> None:
    from torch.utils.checkpoint import checkpoint

    layers = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(4)))
    x = torch.randn(64, 32, requires_grad=True)
    everything = alive_after(lambda: layers(x).sum())
    little = alive_after(lambda: checkpoint(layers, x, use_reentrant=False).sum())
    assert little.total < everything.total / 3
    assert everything.total == 4 * 64 * 32 * 4 + 4  # tanh keeps its result, a linear layer its input, which is that


def test_only_a_gpu_has_an_allocator_to_ask() -> None:
    assert allocated_after(lambda: torch.zeros(1), torch.device("cpu")) is None
