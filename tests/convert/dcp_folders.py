"""Checkpoint folders that torch itself writes: run alone or on gloo ranks, and so without imports of ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

STEP = 7
REFERENCE = "reference.pt"


class Model(nn.Module):
    """With names of ours. Rows do not divide by two ranks, and one parameter has a single row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dit = nn.ModuleDict({"x_embed": nn.Linear(5, 7), "final": nn.Linear(7, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.dit["final"](self.dit["x_embed"](x))


def write(folder: str) -> None:
    """A step of training, saved nested, at the top level, and beside the whole tensors."""
    torch.manual_seed(0)
    model = Model()
    sharded = "WORLD_SIZE" in os.environ
    if sharded:
        dist.init_process_group("gloo")
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    beside = {"step": STEP, "loader": {"rows": torch.arange(3)}, "seen": torch.arange(2)}
    nested = {"model": weights, "optimizer": state, "ema": weights, **beside}
    dcp.save(nested, checkpoint_id=Path(folder) / "nested")
    flat = {f"state.{name}.{key}": value for name, values in state["state"].items() for key, value in values.items()}
    dcp.save({**weights, "optimizer": flat, "step": torch.tensor(STEP)}, checkpoint_id=Path(folder) / "flat")
    reference: dict[Any, Tensor] = {("weight", name): whole(value) for name, value in weights.items()}
    for name, values in state["state"].items():
        reference |= {(key, name): whole(value) for key, value in values.items() if key != "step"}
    if not sharded or dist.get_rank() == 0:
        torch.save(reference, Path(folder) / REFERENCE)
    if sharded:
        dist.destroy_process_group()


def whole(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.clone()
