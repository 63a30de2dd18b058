"""Dimensions and costs of the frozen encoders by name, without building them: transformers takes seconds to import."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from rae_scale.config.paths import resolve_path
from rae_scale.config.schema import EncoderConfig
from rae_scale.models.encoders.flux_vae import FLUX_CONFIG, PACK
from rae_scale.models.encoders.siglip_demo import CONFIG_FILE, SiglipDemoConfig
from rae_scale.models.flops import RGB, Cost, linear, vae_encoder_cost, vit_block_cost, vit_cost


@dataclass(frozen=True)
class EncoderShape:
    """A frozen encoder of images of `image_size` pixels, to latents [num_tokens, channels].

    cost:   of one image.
    layers, tokens, hidden, inner: of its transformer, `tokens` with the class token; no layers if it has none.
    """

    image_size: int
    num_tokens: int
    channels: int
    cost: Cost
    layers: int = 0
    tokens: int = 0
    hidden: int = 0
    inner: int = 0


# As `load_siglip2` and `load_webssl` build them; weights of another size at `model.encoder.path` are not looked into.
SIGLIP2 = SimpleNamespace(hidden_size=1152, num_hidden_layers=27, patch_size=14, intermediate_size=4304)
WEBSSL = SimpleNamespace(hidden_size=1024, num_hidden_layers=24, patch_size=14, intermediate_size=4096)
VIT_PIXELS, VAE_PIXELS = 224, 256


def encoder_shape(cfg: EncoderConfig) -> EncoderShape:
    """Of the encoder that the section names. The demo's is read from its folder, if that is there.

    Raises:
        ValueError: there is no such name.
    """
    if cfg.name == "siglip-demo":
        return demo_shape(demo_config(cfg.path))
    if cfg.name not in PUBLISHED:
        raise ValueError(
            f"model.encoder.name={cfg.name!r} is not a named encoder; choose {', '.join([*PUBLISHED, 'siglip-demo'])}"
        )
    return PUBLISHED[cfg.name]


def vit_shape(config: SimpleNamespace, extra_tokens: int) -> EncoderShape:
    patches, hidden, inner = (VIT_PIXELS // config.patch_size) ** 2, config.hidden_size, config.intermediate_size
    return EncoderShape(
        image_size=VIT_PIXELS,
        num_tokens=patches,
        channels=hidden,
        cost=vit_cost(patches, extra_tokens, config, inner),
        layers=config.num_hidden_layers,
        tokens=patches + extra_tokens,
        hidden=hidden,
        inner=inner,
    )


def vae_shape() -> EncoderShape:
    config = SimpleNamespace(**FLUX_CONFIG)
    side = VAE_PIXELS // 2 ** (len(config.block_out_channels) - 1) // PACK
    cost = vae_encoder_cost(config, VAE_PIXELS)
    return EncoderShape(VAE_PIXELS, side**2, config.latent_channels * PACK**2, cost)


def demo_shape(cfg: SiglipDemoConfig) -> EncoderShape:
    tokens, hidden, inner = cfg.num_tokens, cfg.hidden_size, cfg.intermediate_size
    ends = linear(tokens, cfg.patch_size**2 * RGB, hidden) + linear(tokens, hidden, cfg.channels)
    return EncoderShape(
        image_size=cfg.image_size,
        num_tokens=tokens,
        channels=cfg.channels,
        cost=ends + vit_block_cost(tokens, hidden, inner) * cfg.num_hidden_layers,
        layers=cfg.num_hidden_layers,
        tokens=tokens,
        hidden=hidden,
        inner=inner,
    )


@cache
def demo_config(path: str | None) -> SiglipDemoConfig:
    """What the encoder in folder `path` was built with; of one that is still to be trained, the defaults."""
    file = Path(resolve_path(path)) / CONFIG_FILE if path is not None else None
    if file is None or not file.is_file():
        return SiglipDemoConfig()
    return SiglipDemoConfig(**json.loads(file.read_text(encoding="utf-8")))


PUBLISHED = {"siglip2-so400m": vit_shape(SIGLIP2, 0), "webssl-l": vit_shape(WEBSSL, 1), "flux-vae": vae_shape()}
