"""The models as plain PyTorch modules. What most users need is importable from here, loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rae_scale.models.ddt import DDTHeadConfig
    from rae_scale.models.decoder import DecoderOutput, ViTDecoder, ViTDecoderConfig
    from rae_scale.models.dit import DiT, DiTConfig
    from rae_scale.models.official import from_official, to_official
    from rae_scale.models.zoo import build_decoder, build_dit, model_table

_MODULE_OF = {
    "DDTHeadConfig": "ddt",
    "DecoderOutput": "decoder",
    "DiT": "dit",
    "DiTConfig": "dit",
    "ViTDecoder": "decoder",
    "ViTDecoderConfig": "decoder",
    "build_decoder": "zoo",
    "build_dit": "zoo",
    "from_official": "official",
    "model_table": "zoo",
    "to_official": "official",
}

__all__ = [
    "DDTHeadConfig",
    "DecoderOutput",
    "DiT",
    "DiTConfig",
    "ViTDecoder",
    "ViTDecoderConfig",
    "build_decoder",
    "build_dit",
    "from_official",
    "model_table",
    "to_official",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
