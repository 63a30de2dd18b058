"""From configuration to engine."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from rae_scale.config.schema import EngineConfig, OptimConfig
from rae_scale.engines.base import Engine
from rae_scale.parallel import Mesh, apply_activation_checkpointing, parallelize


def build_engine(
    cfg: EngineConfig,
    optim: OptimConfig,
    module: nn.Module,
    group_of: Callable[[str], str],
    mesh: Mesh,
) -> Engine:
    """Hand `module` to the engine that `cfg` names, on `mesh.device`. Collective.

    module: float32, on CPU or on the device, with the same weights on all ranks; `requires_grad` False freezes a
    parameter. Tensor and sequence parallelism are applied to it here, in place, before the engine shards what is left.
    group_of: parameter name -> key of `optim.groups`.

    Raises:
        ValueError: a parameter has no group or is not float32, nothing is trainable, or neither the engine nor the
            module can run on this mesh.
    """
    if cfg.name == "eager" and mesh.world_size > 1:
        raise ValueError(f"engine.name=eager runs one process, not {mesh.world_size}; use engine.name=zero or fsdp2")
    placements = parallelize(module, mesh)
    apply_activation_checkpointing(module, cfg.activation_checkpointing, cfg.saved_ops)
    if cfg.name == "eager":
        from rae_scale.engines.eager import EagerEngine

        return EagerEngine(cfg, optim, module, group_of, placements, mesh)
    if cfg.name == "fsdp2":
        from rae_scale.engines.fsdp2 import FSDP2Engine

        return FSDP2Engine(cfg, optim, module, group_of, placements, mesh)
    # DeepSpeed takes seconds to import.
    from rae_scale.engines.zero import ZeroEngine

    return ZeroEngine(cfg, optim, module, group_of, placements, mesh)
