"""The config.json of a decoder as the RAE release and as diffusers' AutoencoderRAE spell it, from ours and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rae_scale.models.decoder import RGB, ViTDecoderConfig
from rae_scale.models.encoders.webssl import IMAGENET_MEAN, IMAGENET_STD
from rae_scale.models.official import decoder_config
from rae_scale.models.zoo import DECODER_ZOO, SIGLIP2_CHANNELS, SIGLIP2_MEAN, SIGLIP2_STD, WEBSSL_CHANNELS

DIFFUSERS_CLASS, DIFFUSERS_VERSION = "AutoencoderRAE", "0.39.0"
# diffusers spreads positions over a grid of this many, so that only this grid has the positions of the release.
DIFFUSERS_GRID = 16
DIFFUSERS_HEAD_DIM = 64
DIFFUSERS_MAE_SIZE = 224  # the placeholder encoder's pixels, whatever the decoder's
DIFFUSERS_STD_EPS = 1e-5  # diffusers multiplies latents by (std + this)

# Which encoder's latents a decoder takes, by their channels and the pixel statistics: there is no other record of it.
ENCODERS = {
    "siglip2-so400m": (SIGLIP2_CHANNELS, SIGLIP2_MEAN, SIGLIP2_STD),
    "webssl-l": (WEBSSL_CHANNELS, IMAGENET_MEAN, IMAGENET_STD),
}
DEMO_ENCODER = "siglip-demo"


def to_rae_config(cfg: ViTDecoderConfig) -> dict[str, Any]:
    """The config.json beside the RAE release's `model.pt`, a ViT-MAE's, read by `models.official.from_official` too.

    The release takes the pixel statistics from the encoder's processor; here they are written down, since a file alone
    does not say which encoder it belongs to.
    """
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "hidden_size": cfg.in_channels,
        "decoder_hidden_size": cfg.hidden_size,
        "decoder_num_hidden_layers": cfg.depth,
        "decoder_num_attention_heads": cfg.num_heads,
        "decoder_intermediate_size": cfg.intermediate_size,
        "patch_size": cfg.patch_size,
        "image_size": cfg.image_size,
        "num_channels": RGB,
        "hidden_act": "gelu",
        "layer_norm_eps": cfg.layer_norm_eps,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "norm_pix_loss": False,
        "image_mean": list(cfg.image_mean),
        "image_std": list(cfg.image_std),
    }


def from_rae_config(config: Mapping[str, Any]) -> ViTDecoderConfig:
    """The decoder of a config.json of the RAE release or of ours.

    Raises:
        ValueError: a setting is missing or unknown here.
    """
    cfg = decoder_config(config)
    if "image_mean" in config and "image_std" in config:
        return cfg
    statistics = {channels: (mean, std) for channels, mean, std in ENCODERS.values()}
    mean, std = statistics.get(cfg.in_channels, (cfg.image_mean, cfg.image_std))
    return replace(cfg, image_mean=mean, image_std=std)


def to_diffusers_config(cfg: ViTDecoderConfig) -> dict[str, Any]:
    """The config.json of an `AutoencoderRAE` that decodes as this decoder does, around an encoder of no layers.

    Raises:
        ValueError: diffusers would build another decoder.
    """
    check_diffusers(cfg)
    return {
        "_class_name": DIFFUSERS_CLASS,
        "_diffusers_version": DIFFUSERS_VERSION,
        "encoder_type": "mae",
        "encoder_hidden_size": cfg.in_channels,
        "encoder_patch_size": cfg.patch_size,
        "encoder_num_hidden_layers": 0,
        "encoder_input_size": cfg.image_size,
        "encoder_norm_mean": list(cfg.image_mean),
        "encoder_norm_std": list(cfg.image_std),
        "decoder_hidden_size": cfg.hidden_size,
        "decoder_num_hidden_layers": cfg.depth,
        "decoder_num_attention_heads": cfg.num_heads,
        "decoder_intermediate_size": cfg.intermediate_size,
        "patch_size": cfg.patch_size,
        "image_size": cfg.image_size,
        "num_channels": RGB,
        "latents_mean": None,
        "latents_std": None,
        "noise_tau": 0.0,
        "reshape_to_2d": True,
        "scaling_factor": 1.0,
        "use_encoder_loss": False,
    }


def check_diffusers(cfg: ViTDecoderConfig) -> None:
    if cfg.grid_size != DIFFUSERS_GRID:
        raise ValueError(
            f"this decoder has {cfg.grid_size} x {cfg.grid_size} tokens: diffusers {DIFFUSERS_VERSION} stretches the "
            f"position table of any grid to {DIFFUSERS_GRID} x {DIFFUSERS_GRID} and keeps no other, so it would decode "
            "at wrong positions; use --to official-decoder"
        )
    if cfg.layer_norm_eps != ViTDecoderConfig.layer_norm_eps:
        raise ValueError(
            f"layer_norm_eps={cfg.layer_norm_eps}: diffusers {DIFFUSERS_VERSION} has {ViTDecoderConfig.layer_norm_eps} "
            "and no setting for it; use --to official-decoder"
        )
    if cfg.in_channels % DIFFUSERS_HEAD_DIM:
        raise ValueError(
            f"latents of {cfg.in_channels} channels: diffusers {DIFFUSERS_VERSION} builds an encoder with heads of "
            f"{DIFFUSERS_HEAD_DIM} channels beside every decoder, and so takes multiples of {DIFFUSERS_HEAD_DIM} only; "
            "use --to official-decoder"
        )


def diffusers_companions(cfg: ViTDecoderConfig) -> dict[str, Tensor]:
    """The tensors of an `AutoencoderRAE` beside its decoder, float32.

    Latents are decoded as they are: mean 0, and a deviation to which diffusers adds an epsilon, so that their sum is 1.
    The encoder that diffusers insists on has no layers here, and its embedding is not a number: who encodes with it
    shall see that at once.
    """
    hidden, patch, nan = cfg.in_channels, cfg.patch_size, float("nan")
    embeddings, positions = "encoder.embeddings", 1 + (DIFFUSERS_MAE_SIZE // patch) ** 2
    return {
        "encoder_mean": torch.tensor(cfg.image_mean).view(1, RGB, 1, 1),
        "encoder_std": torch.tensor(cfg.image_std).view(1, RGB, 1, 1),
        "_latents_mean": torch.zeros(1),
        "_latents_std": torch.tensor([1.0 - DIFFUSERS_STD_EPS]),
        f"{embeddings}.cls_token": torch.full((1, 1, hidden), nan),
        f"{embeddings}.position_embeddings": torch.full((1, positions, hidden), nan),
        f"{embeddings}.patch_embeddings.projection.weight": torch.full((hidden, RGB, patch, patch), nan),
        f"{embeddings}.patch_embeddings.projection.bias": torch.full((hidden,), nan),
    }


def from_diffusers_config(config: Mapping[str, Any]) -> ViTDecoderConfig:
    """The decoder in an `AutoencoderRAE` folder, whoever wrote it.

    Raises:
        ValueError: a setting is missing, or the latents are normalised or scaled, which our decoders do not undo.
    """
    if config.get("_class_name") != DIFFUSERS_CLASS:
        raise ValueError(f"config.json: _class_name={config.get('_class_name')!r}, only {DIFFUSERS_CLASS!r} is known")
    for key, neutral in (("latents_mean", None), ("latents_std", None), ("scaling_factor", 1.0)):
        if config.get(key, neutral) != neutral:
            raise ValueError(
                f"config.json: {key} is set: this autoencoder's latents are normalised, and a decoder here takes them "
                "as the encoder gives them"
            )
    try:
        grid = config["encoder_input_size"] // config["encoder_patch_size"]
        cfg = ViTDecoderConfig(
            in_channels=config["encoder_hidden_size"],
            hidden_size=config["decoder_hidden_size"],
            depth=config["decoder_num_hidden_layers"],
            num_heads=config["decoder_num_attention_heads"],
            intermediate_size=config["decoder_intermediate_size"],
            patch_size=config["patch_size"],
            image_size=config["patch_size"] * grid,
            image_mean=tuple(config.get("encoder_norm_mean") or IMAGENET_MEAN),
            image_std=tuple(config.get("encoder_norm_std") or IMAGENET_STD),
        )
    except KeyError as error:
        raise ValueError(f"config.json has no {error.args[0]!r}, which {DIFFUSERS_CLASS} needs; add it") from None
    check_diffusers(cfg)
    return cfg


def decoder_settings(cfg: ViTDecoderConfig) -> dict[str, Any]:
    """Our settings of stage `decoder`, as a tree for `parse_config`, in which this decoder has its name.

    Raises:
        ValueError: no decoder of these sizes has a name, or no encoder has such latents.
    """
    sizes = replace(cfg, in_channels=0, image_mean=SIGLIP2_MEAN, image_std=SIGLIP2_STD)
    names = [name for name, named in DECODER_ZOO.items() if replace(named, in_channels=0) == sizes]
    if not names:
        raise ValueError(
            f"no named decoder has hidden_size={cfg.hidden_size}, depth={cfg.depth}, num_heads={cfg.num_heads}, "
            f"intermediate_size={cfg.intermediate_size}, patch_size={cfg.patch_size}, image_size={cfg.image_size} "
            "(`rae-scale model list` shows them)"
        )
    statistics = cfg.in_channels, cfg.image_mean, cfg.image_std
    encoders = [name for name, known in ENCODERS.items() if known == statistics]
    if not encoders and cfg.grid_size == DIFFUSERS_GRID:
        known = "; ".join(f"{name}: {entry[0]}, {entry[1]}, {entry[2]}" for name, entry in ENCODERS.items())
        raise ValueError(
            f"no encoder here has latents of {cfg.in_channels} channels and pixels of mean {cfg.image_mean} and "
            f"deviation {cfg.image_std}; there is {known}"
        )
    return {
        "stage": "decoder",
        "model": {"encoder": {"name": (encoders or [DEMO_ENCODER])[0]}, "decoder": {"name": names[0]}},
        # Nothing was trained here, but a stage has its groups.
        "optim": {"groups": {"decoder": {"lr": 1e-4}}},
    }
