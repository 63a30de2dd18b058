"""Closed formulas for the floating point operations of every model.

A multiply-add counts as two. Only matrix products count (projections, attention scores and values, patch convolutions):
norms, activations and positions are memory traffic, not FLOPs that a tensor core could do. Widths are the logical ones,
attention is counted in full whether causal or not, and work that is done twice to save memory (activation
checkpointing, flash attention's backward) is counted once: these are the model's FLOPs, the numerator of MFU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rae_scale.models.decoder import ViTDecoderConfig
from rae_scale.models.dit import DiTConfig
from rae_scale.models.encoders import FrozenEncoder
from rae_scale.models.encoders.contrastive import ContrastiveModel
from rae_scale.models.encoders.flux_vae import FluxVAEEncoder
from rae_scale.models.encoders.siglip2 import Siglip2Encoder
from rae_scale.models.encoders.siglip_demo import SiglipDemoEncoder
from rae_scale.models.encoders.webssl import WebSSLEncoder
from rae_scale.models.time_embedding import NUM_FREQUENCIES

RGB = 3

# Dense bf16 peak FLOP/s by the exact name that `torch.cuda.get_device_name` returns, from NVIDIA's data sheets
# (half of the figure that they print "with sparsity"). A GPU that is not listed gets no MFU rather than a guess.
# A100: nvidia-a100-datasheet (312); H100: nvidia-h100-datasheet (SXM 1,979 / PCIe 1,513 sparse);
# H200: hopper-hgx-h200-datasheet (1,979 sparse); B200: HGX B200 data sheet (36 PFLOP/s sparse for eight GPUs).
PEAK_BF16_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
}


@dataclass(frozen=True)
class Cost:
    """FLOPs of one forward pass: products with weights, and products between activations (attention)."""

    linear: float
    attention: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.linear * times, self.attention * times)

    @property
    def forward(self) -> float:
        """A pass without gradients."""
        return self.linear + self.attention

    @property
    def training(self) -> float:
        """Forward, plus the gradients of weights and of inputs: each as much again as the forward."""
        return 3 * self.forward

    @property
    def frozen_training(self) -> float:
        """Forward, plus input gradients only: weights are frozen but gradients pass through to what comes before."""
        return 2 * self.linear + 3 * self.attention


class LanguageModelShape(Protocol):
    """What transformers calls the dimensions of a Qwen2 model. Properties, so that frozen dataclasses fit."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


def linear(tokens: float, in_features: float, out_features: float) -> Cost:
    return Cost(2.0 * tokens * in_features * out_features)


def attention(queries: float, keys: float, width: int) -> Cost:
    """Scores and weighted values, all heads together `width` wide."""
    return Cost(0.0, 4.0 * queries * keys * width)


def dit_cost(cfg: DiTConfig, tokens: int | None = None) -> Cost:
    """One image through the DiT, with its wide head if it has one. `tokens` defaults to the whole grid."""
    tokens = cfg.num_tokens if tokens is None else tokens
    z, hidden = cfg.z_channels, cfg.hidden_size
    cost = linear(tokens, cfg.in_channels, hidden) + linear(1, 2 * NUM_FREQUENCIES, z) + linear(1, z, z)
    cost += dit_block_cost(tokens, hidden, z) * cfg.depth
    if cfg.ddt is not None:
        wide = cfg.ddt.hidden_size
        cost += linear(tokens, cfg.in_channels, wide) + linear(tokens, hidden, wide)
        cost += dit_block_cost(tokens, wide, wide) * cfg.ddt.depth
        hidden = z = wide
    return cost + linear(tokens, z, 2 * hidden) + linear(tokens, hidden, cfg.in_channels)


def dit_block_cost(tokens: int, hidden: int, z: int) -> Cost:
    inner = 8 * hidden // 3
    projections = linear(tokens, hidden, 3 * hidden) + linear(tokens, hidden, hidden)
    mlp = linear(tokens, hidden, 2 * inner) + linear(tokens, inner, hidden)
    return projections + attention(tokens, tokens, hidden) + mlp + linear(tokens, z, 6 * hidden)


def decoder_cost(cfg: ViTDecoderConfig) -> Cost:
    """One image out of the ViT decoder; the class token travels along."""
    tokens, hidden = cfg.num_tokens, cfg.hidden_size
    blocks = vit_block_cost(tokens + 1, hidden, cfg.intermediate_size) * cfg.depth
    return linear(tokens, cfg.in_channels, hidden) + blocks + linear(tokens, hidden, cfg.patch_size**2 * RGB)


def encoder_cost(encoder: FrozenEncoder) -> Cost:
    """One image through a frozen encoder."""
    tokens = encoder.num_tokens
    if isinstance(encoder, SiglipDemoEncoder):
        demo = encoder.cfg
        blocks = vit_block_cost(tokens, demo.hidden_size, demo.intermediate_size) * demo.num_hidden_layers
        ends = linear(tokens, demo.patch_size**2 * RGB, demo.hidden_size)
        return ends + blocks + linear(tokens, demo.hidden_size, demo.channels)
    if isinstance(encoder, Siglip2Encoder):
        config = encoder.transformer.config
        return vit_cost(tokens, 0, config, config.intermediate_size)
    if isinstance(encoder, WebSSLEncoder):
        config = encoder.model.config
        return vit_cost(tokens, 1, config, config.hidden_size * config.mlp_ratio)
    if isinstance(encoder, FluxVAEEncoder):
        return vae_encoder_cost(encoder.model.config, encoder.image_size)
    raise ValueError(f"{type(encoder).__name__}: no FLOP formula; add one to rae_scale/models/flops.py")


def vit_cost(patches: int, extra_tokens: int, config: Any, inner: int) -> Cost:
    """One image through a ViT with a transformers config; `extra_tokens` counts a class token."""
    blocks = vit_block_cost(patches + extra_tokens, config.hidden_size, inner) * config.num_hidden_layers
    return linear(patches, config.patch_size**2 * RGB, config.hidden_size) + blocks


def vit_block_cost(tokens: float, hidden: int, inner: int) -> Cost:
    projections = linear(tokens, hidden, 4 * hidden)
    return projections + attention(tokens, tokens, hidden) + linear(tokens, hidden, 2 * inner)


def vae_encoder_cost(config: Any, image_size: int) -> Cost:
    """One image through the encoder of diffusers' AutoencoderKL, as FLUX has it (no quant_conv)."""
    widths, size = config.block_out_channels, image_size
    cost, previous = conv(size, RGB, widths[0], 3), widths[0]
    for number, width in enumerate(widths):
        for _ in range(config.layers_per_block):
            cost += resnet_cost(size, previous, width)
            previous = width
        if number < len(widths) - 1:
            size //= 2
            cost += conv(size, width, width, 3)
    cost += resnet_cost(size, previous, previous) * 2
    cost += linear(size**2, previous, 4 * previous) + attention(size**2, size**2, previous)
    return cost + conv(size, previous, 2 * config.latent_channels, 3)


def resnet_cost(size: int, in_channels: int, out_channels: int) -> Cost:
    shortcut = conv(size, in_channels, out_channels, 1) if in_channels != out_channels else Cost(0.0)
    return conv(size, in_channels, out_channels, 3) + conv(size, out_channels, out_channels, 3) + shortcut


def conv(size: int, in_channels: int, out_channels: int, kernel: int) -> Cost:
    """A convolution whose result is `size` x `size`."""
    return linear(size**2, in_channels * kernel**2, out_channels)


def contrastive_cost(model: ContrastiveModel, caption_tokens: int) -> Cost:
    """One image and its caption through the encoder stage's model."""
    vision, text = model.vision.cfg, model.text.cfg
    tower = vit_block_cost(caption_tokens, text.hidden_size, text.intermediate_size) * text.num_hidden_layers
    tokens = vision.num_tokens
    pool = linear(tokens, vision.channels, vision.hidden_size) + linear(tokens, vision.hidden_size, 1)
    heads = linear(1, text.hidden_size + vision.hidden_size, text.embed_size)
    dense = linear(tokens, vision.channels, vision.patch_size**2 * RGB)
    return encoder_cost(model.vision) + tower + pool + heads + dense


def llm_cost(shape: LanguageModelShape, tokens: float, tokens_squared: float, labelled: float) -> Cost:
    """Sequences through the language model: the head runs at labelled positions only.

    tokens: over all sequences, the sum of lengths; tokens_squared: the sum of squared lengths (what attention costs).
    """
    hidden = shape.hidden_size
    kv = hidden // shape.num_attention_heads * shape.num_key_value_heads
    layer = linear(tokens, hidden, 2 * hidden + 2 * kv) + linear(tokens, hidden, 3 * shape.intermediate_size)
    layer += attention(tokens_squared, 1, hidden)
    return layer * shape.num_hidden_layers + linear(labelled, hidden, shape.vocab_size)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of `device`, or None when it is not known by its exact name."""
    return PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
