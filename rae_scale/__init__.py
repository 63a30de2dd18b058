"""rae-scale: train Scale-RAE text-to-image models on GPUs, from a laptop to a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rae_scale.infer.hub import RaeScale

__version__ = "0.1.0"
__all__ = ["RaeScale", "__version__"]


def __getattr__(name: str) -> Any:
    """`RaeScale` when it is asked for: torch would make every `import rae_scale` take seconds."""
    if name != "RaeScale":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rae_scale.infer.hub import RaeScale

    return RaeScale
