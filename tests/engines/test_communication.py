"""The formulas of communication on shapes small enough to count by hand. That they are what engines send is measured in
`tests/dist/test_ledger.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rae_scale.config.schema import ParallelConfig
from rae_scale.engines.communication import (
    ParameterSpec,
    Unit,
    flat_buffers,
    fsdp2_volume,
    specs_of,
    units_of,
    zero3_volume,
    zero12_volume,
)
from rae_scale.engines.optimizer import GroupKey
from rae_scale.engines.zero_gathers import Zero3Limits, record_calls, zero3_gathers
from rae_scale.parallel.placement import Placement

SPECS = [
    ParameterSpec("weight", (5, 3), GroupKey("dit")),
    ParameterSpec("bias", (5,), GroupKey("dit")),
    ParameterSpec("frozen", (7,), None),
]


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for block in self.blocks:
            x = block(x)
        return x


def test_fsdp2_with_replicas() -> None:
    """4 shards: 5 rows become 8, 7 become 8; a replica holds a quarter."""
    parallel = ParallelConfig(dp_replicate=2, dp_shard=4)
    units = [Unit(tuple(SPECS[:2])), Unit(tuple(SPECS[2:]), root=True)]
    assert fsdp2_volume(units, parallel, micro_steps=3) == {
        ("all_gather", "shard"): 4 * 3 * (2 * (24 + 8) + 8),
        ("reduce_scatter", "shard"): 4 * 32,
        ("all_reduce", "replicate"): 32,
        ("all_reduce", "shard"): 8,  # of one group's norm
    }
    below = [Unit(tuple(SPECS[2:]), backward=False)]
    assert fsdp2_volume(below, parallel, "bf16") == {("all_gather", "shard"): 2 * 8}


def test_one_process_sends_nothing() -> None:
    root = record_calls(Blocks(), lambda module: module(torch.ones(2, 3)))
    specs = specs_of(Blocks(), lambda name: "dit")
    assert not fsdp2_volume(units_of(Blocks(), specs), ParallelConfig())
    assert not zero12_volume(specs, 1, ParallelConfig())
    assert not zero3_volume(specs, root, ParallelConfig())


def test_zero_1_and_2() -> None:
    """20 trainable elements in one group, padded to a multiple of 2 x 6; norms of 4 and 8 bytes."""
    parallel = ParallelConfig(dp_replicate=2, dp_shard=3)
    norms = {("all_reduce", "shard"): 8}
    gathers = {("all_gather", "dp"): 4 * 24}
    assert zero12_volume(SPECS, 1, parallel, 3) == {("all_reduce", "dp"): 4 * 20 + 4} | gathers | norms
    assert zero12_volume(SPECS, 2, parallel, 3) == {("all_reduce", "dp"): 3 * 4 * 20 + 4} | gathers | norms


def test_zero_3() -> None:
    """2 ranks, blocks of 9 + 3 elements. What persists is gathered once per step, what is let go of twice per
    micro-step, but for the last block: between its two uses backward asks for `scale` only, which is 3 elements."""
    module, parallel = Blocks(), ParallelConfig(dp_shard=2)
    specs = specs_of(module, lambda name: "dit")
    root = record_calls(module, lambda m: m(torch.ones(2, 3)))
    limits = Zero3Limits(persistence=3, reuse=4, prefetch=0)
    numels = {spec.name: spec.numel for spec in specs}
    counts = zero3_gathers(root, numels, micro_steps=2, limits=limits)
    assert counts == {
        "scale": 1,
        "blocks.0.weight": 4,
        "blocks.0.bias": 1,
        "blocks.1.weight": 4,
        "blocks.1.bias": 1,
        "blocks.2.weight": 2,
        "blocks.2.bias": 1,
    }
    assert zero3_volume(specs, root, parallel, "bf16", 2, limits) == {
        ("all_gather", "shard"): 2 * (10 * 10 + 4 * 4),
        ("reduce_scatter", "shard"): 4 * 2 * (3 * 10 + 4 * 4),
        ("all_reduce", "shard"): 8 + 8,
    }
    assert zero3_gathers(root, numels) == dict.fromkeys(numels, 1)


def test_flat_buffers() -> None:
    members = [ParameterSpec(str(index), (10,), GroupKey("dit")) for index in range(5)]
    assert [flat_buffers(members, 2, limit) for limit in (1, 6, 10, 25, 26, 100)] == [5, 3, 3, 1, 1, 1]
    assert flat_buffers([], 2, 10) == 0


def test_units_and_specs_of_a_module() -> None:
    module = Blocks()
    module.blocks[0].requires_grad_(False)
    placements = {name: Placement(tuple(p.shape), count=2) for name, p in module.named_parameters()}
    placements["blocks.1.weight"] = Placement((3, 3), dim=0, index=1, count=2)
    specs = {spec.name: spec for spec in specs_of(module, lambda name: "dit", placements)}
    assert specs["blocks.0.weight"].group is None
    assert specs["blocks.1.weight"] == ParameterSpec("blocks.1.weight", (2, 3), GroupKey("dit"))
    assert specs["scale"].group == GroupKey("dit", replicated=True)
    units = units_of(module, specs.values())
    assert [[spec.name for spec in unit.parameters] for unit in units] == [
        [f"blocks.{index}.{kind}" for kind in ("weight", "bias")] for index in range(3)
    ] + [["scale"]]
    assert [unit.root for unit in units] == [False, False, False, True]
