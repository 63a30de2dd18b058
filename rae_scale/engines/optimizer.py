"""AdamW with one parameter group per optimizer group: the same for every engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rae_scale.config.schema import OptimConfig


def group_parameters(
    module: nn.Module, group_of: Callable[[str], str], optim: OptimConfig
) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The trainable parameters by optimizer group; groups without any are left out, the order is `optim.groups`'.

    Raises:
        ValueError: a parameter's group has no settings, a parameter is not float32, or nothing is trainable.
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in optim.groups}
    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"parameter {name} is {parameter.dtype}; engines keep float32 weights and cast where they compute: "
                "build or load the model in float32"
            )
        if not parameter.requires_grad:
            continue
        group = group_of(name)
        if group not in groups:
            raise ValueError(f"parameter {name} belongs to optim.groups.{group}, which is not set; give it an lr")
        groups[group].append((name, parameter))
    if not any(groups.values()):
        raise ValueError("every parameter is frozen: there is nothing to train")
    return {name: members for name, members in groups.items() if members}


def adamw(tensors: Mapping[str, list[Tensor]], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the tensors of each group; `param_groups` carry the group's "name"."""
    groups = [
        {
            "params": members,
            "name": name,
            "lr": optim.groups[name].lr,
            "betas": optim.groups[name].betas,
            "eps": optim.groups[name].eps,
            "weight_decay": optim.groups[name].weight_decay,
        }
        for name, members in tensors.items()
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
