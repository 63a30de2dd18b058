"""A run folder whose model was never trained but draws: every part of it has an effect on the picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rae_scale.config import Config
from rae_scale.engines import build_engine
from rae_scale.infer.export import export
from rae_scale.parallel import Mesh
from rae_scale.state import save_checkpoint
from rae_scale.train.parts import build_parts
from tests.train.tiny_world import TinyWorld, make_world

CPU = torch.device("cpu")
STEPS = 4


@dataclass(frozen=True)
class Trained:
    world: TinyWorld
    run: Path
    """Run folder of stage pretrain, with moving averages."""
    decoder_run: Path
    """Run folder of stage decoder, without."""
    decoder: Path
    """The decoder's weights, exported."""


def make_trained(folder: Path) -> Trained:
    world = make_world(folder)
    decoder_run = save_run(world.config(folder / "decoder-run", stage="decoder"))
    decoder = export(decoder_run, folder / "decoder")
    settings: dict[str, Any] = {
        "model__decoder__path": str(decoder),
        "optim__ema_decay": 0.5,
        "sampler__steps": STEPS,
        "sampler__guidance": 2.0,
    }
    run = save_run(world.config(folder / "run", **settings))
    return Trained(world, run, decoder_run, decoder)


def save_run(config: Config) -> Path:
    """One checkpoint of the stage's model with weights that are nowhere zero, and an average that differs from them."""
    parts = build_parts(config, CPU)
    module, mesh = parts.stage.module, Mesh(CPU)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    engine = build_engine(config.engine, config.optim, module, parts.stage.group_of, mesh)
    engine.backward(sum(parameter.sum() for parameter in module.parameters()), last=True)
    engine.step({name: 0.1 for name in config.optim.groups})
    save_checkpoint(config.run.dir, 1, engine, mesh, {"config": config.model_dump(mode="json")}, keep_last=1)
    return Path(config.run.dir)
