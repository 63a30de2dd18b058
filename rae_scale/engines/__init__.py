"""Three ways to hold and update a model behind one protocol: eager, fsdp2, zero (DeepSpeed)."""

from rae_scale.engines.base import Copy, Engine, Piece, StepResult
from rae_scale.engines.build import build_engine

__all__ = ["Copy", "Engine", "Piece", "StepResult", "build_engine"]
