"""Every named DiT and decoder, the functions that build them, and the table of all named models."""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict, TypeVar

import torch
from torch import nn

from rae_scale.config.schema import DecoderConfig, ModelConfig
from rae_scale.models.blocks import SwiGLU
from rae_scale.models.ddt import DDTHeadConfig
from rae_scale.models.decoder import ViTDecoder, ViTDecoderConfig
from rae_scale.models.dit import DiT, DiTConfig
from rae_scale.models.llm_zoo import LLM_ZOO

Named = TypeVar("Named", DiTConfig, ViTDecoderConfig)

SIGLIP2_CHANNELS = 1152
WEBSSL_CHANNELS = 1024
FLUX_VAE_CHANNELS = 64  # 16 channels, packed 2 x 2
SIGLIP2_MEAN = SIGLIP2_STD = (0.5, 0.5, 0.5)

# Paper Table 10: hidden size and depth; 32 heads at every size, and a condition as wide as the model.
PUBLISHED_SIZES = {
    "dit-0.5b": (1280, 16),
    "dit-2.4b": (2048, 32),
    "dit-3.1b": (2304, 32),
    "dit-5.5b": (3072, 32),
    "dit-9.8b": (4096, 32),
}


def _published(hidden_size: int, depth: int, in_channels: int, ddt: DDTHeadConfig | None = None) -> DiTConfig:
    return DiTConfig(
        in_channels=in_channels, hidden_size=hidden_size, depth=depth, num_heads=32, z_channels=hidden_size, ddt=ddt
    )


DIT_ZOO: dict[str, DiTConfig] = {
    # For 64 x 64 pixel images and the demo's encoder: 4 x 4 tokens of 64 channels.
    "dit-demo": DiTConfig(in_channels=64, hidden_size=144, depth=6, num_heads=4, z_channels=144, grid_size=4),
    # For tests.
    "dit-tiny": DiTConfig(in_channels=16, hidden_size=48, depth=2, num_heads=4, z_channels=48, grid_size=4),
}
for _name, (_hidden_size, _depth) in PUBLISHED_SIZES.items():
    DIT_ZOO[_name] = _published(_hidden_size, _depth, SIGLIP2_CHANNELS)
    DIT_ZOO[f"{_name}-vae"] = _published(_hidden_size, _depth, FLUX_VAE_CHANNELS)
    DIT_ZOO[f"{_name}-webssl"] = _published(_hidden_size, _depth, WEBSSL_CHANNELS)
    DIT_ZOO[f"{_name}-ddt"] = _published(_hidden_size, _depth, SIGLIP2_CHANNELS, DDTHeadConfig())


def _released(hidden_size: int, depth: int, num_heads: int, intermediate_size: int) -> ViTDecoderConfig:
    return ViTDecoderConfig(
        in_channels=SIGLIP2_CHANNELS,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        intermediate_size=intermediate_size,
        patch_size=14,
        image_size=224,
    )


DECODER_ZOO: dict[str, ViTDecoderConfig] = {
    "vit-b": _released(768, 12, 12, 3072),
    "vit-l": _released(1024, 24, 16, 4096),
    "vit-xl": _released(1152, 28, 16, 4096),
    "vit-tiny": ViTDecoderConfig(
        in_channels=64, hidden_size=128, depth=4, num_heads=4, intermediate_size=384, patch_size=16, image_size=64
    ),
    "vit-test": ViTDecoderConfig(
        in_channels=16, hidden_size=32, depth=1, num_heads=2, intermediate_size=64, patch_size=4, image_size=16
    ),
}


class ModelRow(TypedDict):
    name: str
    kind: str
    hidden_size: int
    depth: int
    num_heads: int
    parameters: int


def build_dit(cfg: ModelConfig) -> DiT:
    """Build the DiT that `model.name` names, with random weights. Raises what `dit_config` does."""
    return DiT(dit_config(cfg))


def dit_config(cfg: ModelConfig) -> DiTConfig:
    """The dimensions of the DiT that `model.name` names, with the section's other settings.

    Raises:
        ValueError: there is no such name, or `model.ddt_num_heads` does not fit its wide head, or it has none.
    """
    named = _find("model.name", cfg.name, DIT_ZOO)
    return replace(named, qk_norm=cfg.qk_norm, class_dropout_prob=cfg.class_dropout_prob, ddt=_ddt_config(cfg, named))


def _ddt_config(cfg: ModelConfig, named: DiTConfig) -> DDTHeadConfig | None:
    if cfg.ddt_num_heads is None:
        return named.ddt
    if named.ddt is None:
        with_head = ", ".join(name for name, dit in DIT_ZOO.items() if dit.ddt is not None)
        raise ValueError(
            f"model.ddt_num_heads={cfg.ddt_num_heads}, but model.name={cfg.name!r} has no DDT head; remove it, or "
            f"choose one of {with_head}"
        )
    try:
        return replace(named.ddt, num_heads=cfg.ddt_num_heads)
    except ValueError as error:
        raise ValueError(f"model.ddt_num_heads={cfg.ddt_num_heads}: {error}") from None


def build_decoder(
    cfg: DecoderConfig,
    encoder_channels: int,
    *,
    image_mean: tuple[float, float, float] = SIGLIP2_MEAN,
    image_std: tuple[float, float, float] = SIGLIP2_STD,
) -> ViTDecoder:
    """Build the decoder that `model.decoder.name` names, with random weights, for the latents of an encoder.

    `encoder_channels`, `image_mean` and `image_std` are the encoder's. ValueError if there is no such name.
    """
    named = _find("model.decoder.name", cfg.name, DECODER_ZOO)
    return ViTDecoder(replace(named, in_channels=encoder_channels, image_mean=image_mean, image_std=image_std))


def _find(setting: str, name: str, zoo: dict[str, Named]) -> Named:
    if name not in zoo:
        raise ValueError(f"{setting}={name!r} names no model; choose one of {', '.join(zoo)}")
    return zoo[name]


def logical_parameters(model: nn.Module) -> int:
    """Number of parameters of the published model: ours without the SwiGLU padding."""
    padding = sum(part.num_padding_parameters for part in model.modules() if isinstance(part, SwiGLU))
    return sum(parameter.numel() for parameter in model.parameters()) - padding


def model_table() -> list[ModelRow]:
    """One row for every named model. Parameters are counted on modules built on the meta device: they need no memory.

    Dimensions of a DiT with the wide head are its backbone's; its parameters include the head.
    """
    from transformers import Qwen2ForCausalLM

    rows: list[ModelRow] = []

    def add(name: str, kind: str, dimensions: tuple[int, int, int], model: nn.Module) -> None:
        hidden_size, depth, num_heads = dimensions
        rows.append(
            ModelRow(
                name=name,
                kind=kind,
                hidden_size=hidden_size,
                depth=depth,
                num_heads=num_heads,
                parameters=logical_parameters(model),
            )
        )

    with torch.device("meta"):
        for name, dit in DIT_ZOO.items():
            add(name, "dit", (dit.hidden_size, dit.depth, dit.num_heads), DiT(dit))
        for name, vit in DECODER_ZOO.items():
            add(name, "decoder", (vit.hidden_size, vit.depth, vit.num_heads), ViTDecoder(vit))
        for name, llm in LLM_ZOO.items():
            dimensions = llm.hidden_size, llm.num_hidden_layers, llm.num_attention_heads
            add(name, "llm", dimensions, Qwen2ForCausalLM(llm.to_qwen2()))
    return rows
