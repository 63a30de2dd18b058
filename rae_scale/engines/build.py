"""From configuration to engine."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from rae_scale.config.schema import EngineConfig, OptimConfig
from rae_scale.engines.base import Engine
from rae_scale.parallel import Mesh, apply_activation_checkpointing, compile_blocks, parallelize


def build_engine(
    cfg: EngineConfig,
    optim: OptimConfig,
    module: nn.Module,
    group_of: Callable[[str], str],
    mesh: Mesh,
) -> Engine:
    """Hand `module` to the engine that `cfg` names, on `mesh.device`. Collective.

    module: float32, on CPU or on the device, with the same weights on all ranks; `requires_grad` False freezes a
    parameter. What `cfg` and the mesh want of the layers (parallelism, 8-bit products, compilation, checkpointing) is
    done to it here, in place, before the engine shards what is left.
    group_of: parameter name -> key of `optim.groups`.

    Raises:
        ValueError: a parameter has no group or is not float32, nothing is trainable, or the engine, the module or an
            option of `cfg` cannot run on this mesh.
    """
    if cfg.name == "eager" and mesh.world_size > 1:
        raise ValueError(f"engine.name=eager runs one process, not {mesh.world_size}; use engine.name=zero or fsdp2")
    placements = parallelize(module, mesh)
    if cfg.fp8:
        from rae_scale.parallel.fp8 import convert_to_fp8

        convert_to_fp8(module, mesh.device)
    compile_blocks(module, cfg.compile, mesh.device)
    # After it: backward runs the compiled block again, and not a compiled "run again".
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
