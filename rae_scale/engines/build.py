"""From configuration to engine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from rae_scale.config.schema import EngineConfig, OptimConfig
from rae_scale.engines.base import Engine
from rae_scale.parallel import Mesh, apply_activation_checkpointing


def build_engine(
    cfg: EngineConfig,
    optim: OptimConfig,
    module: nn.Module,
    group_of: Callable[[str], str],
    mesh: Mesh,
    device: torch.device,
) -> Engine:
    """Hand `module` to the engine that `cfg` names. Collective.

    module: float32, on CPU or on `device`, with the same weights on all ranks; `requires_grad` False freezes a
    parameter. group_of: parameter name -> key of `optim.groups`.

    Raises:
        ValueError: a parameter has no group or is not float32, nothing is trainable, or the engine cannot run on this
            mesh.
    """
    if cfg.activation_checkpointing == "full":
        apply_activation_checkpointing(module)
    if cfg.name == "eager":
        if mesh.world_size > 1:
            raise ValueError(
                f"engine.name=eager runs one process, not {mesh.world_size}; use engine.name=zero or fsdp2"
            )
        from rae_scale.engines.eager import EagerEngine

        return EagerEngine(cfg, optim, module, group_of, device)
    if cfg.name == "fsdp2":
        from rae_scale.engines.fsdp2 import FSDP2Engine

        return FSDP2Engine(cfg, optim, module, group_of, mesh, device)
    # DeepSpeed takes seconds to import.
    from rae_scale.engines.zero import ZeroEngine

    return ZeroEngine(cfg, optim, module, group_of, mesh, device)
