"""What the frozen encoder takes: its float32 weights all the time, and more while it runs. Closed forms, since to
import the published ones takes seconds."""

from __future__ import annotations

from functools import cache

import torch

from rae_scale.config import Config
from rae_scale.config.schema import EncoderConfig
from rae_scale.models.encoders.flux_vae import FLUX_CONFIG
from rae_scale.models.encoders.siglip_demo import SiglipDemoEncoder
from rae_scale.models.flops import RGB
from rae_scale.plan.encoders import EncoderShape, demo_config, encoder_shape
from rae_scale.train.parts import encoder_draws

FLOAT32, BFLOAT16 = 4, 2
VAE_PARAMETERS = 83_819_683
"""Of FLUX.1's autoencoder, its decoder included."""


def frozen_encoder(config: Config, micro_batch: int) -> tuple[int, int]:
    """Bytes of the weights, and on top of them while a micro-batch is encoded. Nothing in the stage that trains it.

    Ranks that have the same samples share them out (`parallel/share.py`). With `data.latent_cache` no step needs it.
    """
    if config.stage == "encoder":
        return 0, 0
    cfg = config.model.encoder
    if config.data.latent_cache is not None:
        return FLOAT32 * encoder_parameters(cfg) if encoder_draws(config) else 0, 0
    shape = encoder_shape(cfg)
    images = -(-micro_batch // (config.parallel.sp * config.parallel.tp))
    element = BFLOAT16 if config.engine.precision == "bf16" else FLOAT32
    running = vit_bytes(shape, element) if shape.layers else vae_bytes(element)
    return FLOAT32 * encoder_parameters(cfg), images * running


@cache
def encoder_parameters(cfg: EncoderConfig) -> int:
    """Of the encoder that the section names, as it is loaded."""
    if cfg.name == "siglip-demo":
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in SiglipDemoEncoder(demo_config(cfg.path)).parameters())
    shape = encoder_shape(cfg)
    return vit_parameters(shape) if shape.layers else VAE_PARAMETERS


def vit_parameters(shape: EncoderShape) -> int:
    """Patches, positions, and blocks of attention 4 h^2, MLP 2 h f, biases and two norms."""
    hidden, inner = shape.hidden, shape.inner
    patch = shape.image_size**2 // shape.num_tokens
    block = 4 * hidden**2 + 2 * hidden * inner + 9 * hidden + inner
    return shape.layers * block + (RGB * patch + 1 + shape.tokens) * hidden


def vit_bytes(shape: EncoderShape, element: int) -> int:
    """Per image, at the widest place: the residual, its sum and its norm in float32, the MLP's inner layer twice."""
    return shape.tokens * (3 * FLOAT32 * shape.hidden + 2 * element * shape.inner)


def vae_bytes(element: int) -> int:
    """Per image, at full resolution: a residual block's input, its norm and activation in float32, and its result."""
    width: int = FLUX_CONFIG["block_out_channels"][0]  # type: ignore[index]
    return 256**2 * width * (2 * FLOAT32 + 2 * element)
