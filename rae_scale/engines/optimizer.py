"""The parameters by optimizer group, the same for every engine, and torch's AdamW over them for DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rae_scale.config.schema import OptimConfig
from rae_scale.parallel.placement import Placement


class GroupKey(NamedTuple):
    """Parameters that share their settings and the way in which they lie on the ranks."""

    name: str
    """Of `optim.groups`."""
    replicated: bool = False
    """Every tensor-parallel rank holds the whole of them. False where there is no tensor parallelism."""


def group_parameters(
    module: nn.Module,
    group_of: Callable[[str], str],
    optim: OptimConfig,
    placements: Mapping[str, Placement],
) -> dict[GroupKey, list[tuple[str, nn.Parameter]]]:
    """The trainable parameters by group; groups without any are left out, the order is `optim.groups`'.

    Raises:
        ValueError: a parameter's group has no settings, a parameter is not float32, or nothing is trainable.
    """
    groups: dict[GroupKey, list[tuple[str, nn.Parameter]]] = {
        GroupKey(name, replicated): [] for name in optim.groups for replicated in (False, True)
    }
    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"parameter {name} is {parameter.dtype}; engines keep float32 weights and cast where they compute: "
                "build or load the model in float32"
            )
        if not parameter.requires_grad:
            continue
        group = group_of(name)
        if group not in optim.groups:
            raise ValueError(f"parameter {name} belongs to optim.groups.{group}, which is not set; give it an lr")
        placement = placements[name]
        groups[GroupKey(group, placement.count > 1 and not placement.is_split)].append((name, parameter))
    if not any(groups.values()):
        raise ValueError("every parameter is frozen: there is nothing to train")
    return {key: members for key, members in groups.items() if members}


def adamw(tensors: Mapping[GroupKey, list[Tensor]], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the tensors of each group; `param_groups` carry its name and key."""
    groups = [
        {
            "params": members,
            "name": key.name,
            "key": key,
            "lr": optim.groups[key.name].lr,
            "betas": optim.groups[key.name].betas,
            "eps": optim.groups[key.name].eps,
            "weight_decay": optim.groups[key.name].weight_decay,
        }
        for key, members in tensors.items()
    ]
    return torch.optim.AdamW(groups, fused=True)


def init_state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> None:
    """Give `tensor` the state that AdamW would at its first step, so that there is something to save and load into."""
    optimizer.state[tensor] = {
        "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
        "exp_avg": torch.zeros_like(tensor),
        "exp_avg_sq": torch.zeros_like(tensor),
    }


def set_learning_rates(optimizer: torch.optim.Optimizer, lrs: Mapping[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lrs[group["name"]]


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set how many updates AdamW has made, which decides its bias correction."""
    for state in optimizer.state.values():
        state["step"].fill_(step)
