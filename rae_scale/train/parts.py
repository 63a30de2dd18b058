"""The models and batches of each stage, from configuration."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rae_scale.config import Config
from rae_scale.data.chat import ChatTokenizer
from rae_scale.data.tokenizer import load_tokenizer
from rae_scale.models.composite import build_scale_rae
from rae_scale.models.decoder import ViTDecoder
from rae_scale.models.encoders import FrozenEncoder, build_encoder
from rae_scale.models.encoders.contrastive import ContrastiveModel, TextTowerConfig
from rae_scale.models.encoders.flux_vae import FluxVAEEncoder
from rae_scale.models.encoders.siglip_demo import load_siglip_demo
from rae_scale.models.zoo import build_decoder
from rae_scale.state import read_weights
from rae_scale.train.batches import BatchMaker, CaptionBatches, ConversationBatches, ImageBatches
from rae_scale.train.stages import DecoderStage, EncoderStage, GenerationStage, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Parts:
    """What a stage trains, and how samples become its batches."""

    stage: Stage
    batches: BatchMaker


Shell = Callable[[], AbstractContextManager[None]]


def build_parts(config: Config, device: torch.device, shell: Shell = nullcontext) -> Parts:
    """Build the models of `config.stage`: the trained one on the CPU, frozen ones on `device`.

    Random weights are a function of `run.seed`, so every rank and every engine begins from the same ones. Paths in
    `config` must be resolved. shell: what the trained model of a generation stage is built inside.
    Raises ValueError for settings that name no model, or weights that do not fit.
    """
    torch.manual_seed(config.run.seed)
    if config.stage in GENERATION_STAGES:
        return build_generation(config, device, shell)
    return BUILDERS[config.stage](config, device)


def build_generation(config: Config, device: torch.device, shell: Shell) -> Parts:
    tokenizer = load_stage_tokenizer(config)
    encoder = build_encoder(config.model.encoder)
    with shell():
        model = build_scale_rae(config.model, encoder.channels, encoder.num_tokens, len(tokenizer))
    data = config.data
    chat = ChatTokenizer(tokenizer, encoder.num_tokens, data.max_seq_len, label_markup=data.label_markup)
    # Where latents are cached, whether the encoder has anything to do is found out later.
    encodes = data.latent_cache is None
    encoder = encoder.to(device) if encodes else encoder
    stage = GenerationStage(model, encoder, config.flow, seed=config.run.seed, encodes=encodes)
    return Parts(stage, ConversationBatches(chat, data.prompt_template, encoder.image_size))


def build_decoder_stage(config: Config, device: torch.device) -> Parts:
    encoder = build_encoder(config.model.encoder)
    decoder = build_stage_decoder(config, encoder)
    check_same_images(config, decoder, encoder)
    stage = DecoderStage(decoder, encoder.to(device), config.loss)
    return Parts(stage, ImageBatches(encoder.image_size))


def build_encoder_stage(config: Config, device: torch.device) -> Parts:
    tokenizer = load_stage_tokenizer(config)
    check_trained_encoder(config)
    vision = load_siglip_demo(config.model.encoder.path)
    model = ContrastiveModel(vision, TextTowerConfig(vocab_size=len(tokenizer)))
    batches = CaptionBatches(vision.image_size, tokenizer, model.text.cfg.max_length)
    return Parts(EncoderStage(model, config.loss), batches)


GENERATION_STAGES = ("pretrain", "finetune")
BUILDERS: dict[str, Callable[[Config, torch.device], Parts]] = {
    "encoder": build_encoder_stage,
    "decoder": build_decoder_stage,
}


def without_llm_weights(config: Config) -> Config:
    """`config` without the weights of `model.llm.path`, for models that get theirs from elsewhere.

    The tokenizer is still taken from there: it decides the rows of the embedding.
    """
    llm = config.model.llm
    bare = llm.model_copy(update={"path": None, "tokenizer": llm.tokenizer or llm.path})
    return config.model_copy(update={"model": config.model.model_copy(update={"llm": bare})})


def load_stage_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    path = config.model.llm.tokenizer or config.model.llm.path
    if path is None:
        raise ValueError(
            "model.llm.tokenizer is not set and there is no model.llm.path to take it from; give a folder or hub id, "
            "for example model.llm.tokenizer=Qwen/Qwen2.5-1.5B-Instruct"
        )
    return load_tokenizer(path)


def build_stage_decoder(config: Config, encoder: FrozenEncoder) -> ViTDecoder:
    """The decoder that `model.decoder` names, from its path's weights or random ones."""
    cfg = config.model.decoder
    decoder = build_decoder(cfg, encoder.channels, image_mean=encoder.image_mean, image_std=encoder.image_std)
    if cfg.path is not None:
        load_weights(decoder, read_weights(cfg.path), f"model.decoder.path={cfg.path!r}")
    return decoder


def check_trained_encoder(config: Config) -> None:
    name = config.model.encoder.name
    if name != "siglip-demo":
        raise ValueError(
            f"model.encoder.name={name!r} with stage=encoder: published encoders are used as they are, only the demo's "
            "is trained; set model.encoder.name=siglip-demo"
        )


def check_same_images(config: Config, decoder: ViTDecoder, encoder: FrozenEncoder) -> None:
    wanted, given = (encoder.num_tokens, encoder.image_size), (decoder.cfg.num_tokens, decoder.cfg.image_size)
    if wanted != given:
        raise ValueError(
            f"model.decoder.name={config.model.decoder.name!r} makes {given[1]} px images from {given[0]} tokens, but "
            f"model.encoder.name={config.model.encoder.name!r} turns {wanted[1]} px images into {wanted[0]}; choose "
            "the decoder made for this encoder (`rae-scale model list`)"
        )


def build_decode(config: Config, encoder: FrozenEncoder, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Latents [B, T, C] to pixels [B, 3, S, S] in [0, 1]; None if the configuration has no trained decoder."""
    if isinstance(encoder, FluxVAEEncoder):
        return encoder.decode
    if config.model.decoder.path is None:
        return None
    return build_stage_decoder(config, encoder).eval().requires_grad_(False).to(device).decode


def put_away(encoder: FrozenEncoder, config: Config, device: torch.device) -> None:
    """Of an encoder that no step needs keep the sizes alone; all of it, on `device`, if it draws."""
    encoder.to(device if encoder_draws(config) else "meta")
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was encoded in before the first step


def encoder_draws(config: Config) -> bool:
    """Whether the sample pictures of the run are decoded by the encoder's own other half."""
    return config.model.encoder.name == "flux-vae" and bool(config.run.sample_every and config.run.sample_prompts)


def load_weights(module: torch.nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Copy `weights` into every parameter of `module`; `origin` names them in errors.

    Nothing is copied if anything does not fit: the ValueError lists what is missing, unknown or differently shaped.
    """
    own = dict(module.named_parameters())
    problems = [f"{name} {list(tensor.shape)} is missing" for name, tensor in own.items() if name not in weights]
    for name, tensor in weights.items():
        if name not in own:
            problems.append(f"{name} {list(tensor.shape)} is not part of the model")
        elif tensor.shape != own[name].shape:
            problems.append(f"{name} is {list(tensor.shape)}, {list(own[name].shape)} in the model")
    if problems:
        shown = "\n  ".join(problems[:10]) + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"{origin} does not fit the model:\n  {shown}\ngive weights of the model that is configured")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
