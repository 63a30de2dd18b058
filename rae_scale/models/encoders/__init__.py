"""Frozen encoders: the models whose latents are generated and understood."""

from __future__ import annotations

from collections.abc import Callable

from rae_scale.config.schema import EncoderConfig
from rae_scale.models.encoders.base import FrozenEncoder
from rae_scale.models.encoders.flux_vae import load_flux_vae
from rae_scale.models.encoders.siglip2 import load_siglip2
from rae_scale.models.encoders.siglip_demo import load_siglip_demo
from rae_scale.models.encoders.webssl import load_webssl

__all__ = ["ENCODERS", "FrozenEncoder", "build_encoder"]

ENCODERS: dict[str, Callable[[str | None], FrozenEncoder]] = {
    "siglip2-so400m": load_siglip2,
    "webssl-l": load_webssl,
    "flux-vae": load_flux_vae,
    "siglip-demo": load_siglip_demo,
}


def build_encoder(cfg: EncoderConfig) -> FrozenEncoder:
    """Build the encoder `cfg.name` with the weights at `cfg.path`, in evaluation mode and without gradients.

    ValueError if the name is unknown or the weights cannot be read.
    """
    if cfg.name not in ENCODERS:
        raise ValueError(f"model.encoder.name={cfg.name!r} is not a named encoder; choose {', '.join(ENCODERS)}")
    return ENCODERS[cfg.name](cfg.path).eval().requires_grad_(False)
