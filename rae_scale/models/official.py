"""Models to and from the layout of the official Scale-RAE and RAE checkpoints.

One table serves both directions: for every tensor of the official layout, a view of ours and the official shape. It
hides the three differences: other names, 1x1 convolutions and separate query, key, value there, SwiGLU padding here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rae_scale.models.blocks import Attention, DiTBlock, SwiGLU
from rae_scale.models.ddt import DDTHeadConfig
from rae_scale.models.decoder import ViTDecoder, ViTDecoderConfig
from rae_scale.models.dit import DiT, DiTConfig

CONSTANT_TOLERANCE = 1e-2  # a bfloat16 checkpoint stores its sines and cosines this coarsely
MOST_LISTED = 20  # a forgotten prefix makes every key wrong


class OfficialTensor(NamedTuple):
    """One tensor of the official layout. `view` holds its entries in order; a constant is compared, not loaded."""

    name: str
    view: Tensor
    shape: tuple[int, ...]
    constant: bool = False


def from_official(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> DiT | ViTDecoder:
    """Build a DiT, a DiT with the DDT head, or a ViT decoder and load its official weights, as float32 on the CPU.

    `config` holds the constructor's arguments in the official spelling. Which model it describes shows in its keys:
    `decoder_hidden_size` is a decoder's, and a DiT whose `hidden_size` is a pair (backbone, head) has the DDT head.
    Without `input_size` the grid is read off the state dict's `pos_embed`.
    ValueError names a missing setting, and the tensors that are missing, unknown, or of another shape.
    """
    model: DiT | ViTDecoder
    with torch.device("meta"):  # the weights are about to be overwritten: drawing random ones takes minutes at 9.8B
        if "decoder_hidden_size" in config:
            model = ViTDecoder(decoder_config(config))
        else:
            model = DiT(_dit_config(state_dict, config))
    model.to_empty(device="cpu")
    model.init_constants()
    load_official(model, state_dict)
    return model


@torch.no_grad()
def load_official(model: DiT | ViTDecoder, state_dict: Mapping[str, Tensor]) -> None:
    """Copy official weights into `model`. Nothing is copied if a tensor does not fit (ValueError)."""
    table = {entry.name: entry for entry in official_tensors(model)}
    problems = [f"{name} {list(entry.shape)} is missing" for name, entry in table.items() if name not in state_dict]
    for name, tensor in state_dict.items():
        if name not in table:
            problems.append(f"{name} {list(tensor.shape)} is not part of this model")
            continue
        entry = table[name]
        if tuple(tensor.shape) != entry.shape:
            problems.append(f"{name} is {list(tensor.shape)} in the checkpoint, {list(entry.shape)} in the model")
        elif entry.constant and not _close(tensor, entry):
            problems.append(f"{name} differs from the fixed table that this model uses")
    if problems:
        listed = problems[:MOST_LISTED]
        if len(problems) > len(listed):
            listed.append(f"and {len(problems) - len(listed)} more")
        raise ValueError(
            "the official state dict does not fit its config:\n  "
            + "\n  ".join(listed)
            + "\nuse the config that was saved with this checkpoint, and strip any prefix from its keys"
        )
    for name, entry in table.items():
        if not entry.constant:
            entry.view.copy_(state_dict[name].reshape(entry.view.shape))


def to_official(model: DiT | ViTDecoder) -> dict[str, Tensor]:
    """The model's weights in official names and shapes, padding cropped, as copies; the inverse of `load_official`."""
    return {
        entry.name: entry.view.detach().clone(memory_format=torch.contiguous_format).reshape(entry.shape)
        for entry in official_tensors(model)
    }


def official_tensors(model: DiT | ViTDecoder) -> Iterator[OfficialTensor]:
    """Every tensor of the official layout, as a view of the model's parameter or constant."""
    return _decoder_tensors(model) if isinstance(model, ViTDecoder) else _dit_tensors(model)


def _dit_tensors(model: DiT) -> Iterator[OfficialTensor]:
    head = model.head
    yield _constant("pos_embed", model.pos_embed[None])
    yield from _conv("x_embedder.proj", model.x_embed)
    yield from _linear("t_embedder.mlp.0", model.condition.time.mlp[0])
    yield from _linear("t_embedder.mlp.2", model.condition.time.mlp[2])
    yield _same("y_embedder.dropout_embedding", model.condition.null)
    if head is None:
        yield _constant("feat_rope.freqs_cos", model.rope_cos)
        yield _constant("feat_rope.freqs_sin", model.rope_sin)
    else:
        yield _constant("enc_rope.freqs_cos", model.rope_cos)
        yield _constant("enc_rope.freqs_sin", model.rope_sin)
        yield _constant("dec_rope.freqs_cos", head.rope_cos)
        yield _constant("dec_rope.freqs_sin", head.rope_sin)
        yield from _conv("s_embedder.proj", head.x_embed)
        yield from _linear("s_projector", head.condition)
    for index, block in enumerate([*model.blocks, *model.head_blocks]):
        yield from _dit_block(f"dit_blocks.{index}", block)
    yield _same("final_layer.norm_final.weight", model.final.norm.weight)
    yield from _linear("final_layer.adaLN_modulation.1", model.final.adaln)
    yield from _linear("final_layer.linear", model.final.linear)


def _dit_block(name: str, block: DiTBlock) -> Iterator[OfficialTensor]:
    yield _same(f"{name}.norm1.weight", block.norm1.weight)
    yield _same(f"{name}.norm2.weight", block.norm2.weight)
    yield from _linear(f"{name}.attn.qkv", block.attn.qkv)
    yield from _linear(f"{name}.attn.proj", block.attn.proj)
    if block.attn.q_norm is not None and block.attn.k_norm is not None:
        yield _same(f"{name}.attn.q_norm.weight", block.attn.q_norm.weight)
        yield _same(f"{name}.attn.k_norm.weight", block.attn.k_norm.weight)
    yield from _swiglu(f"{name}.mlp", block.mlp)
    yield from _linear(f"{name}.adaLN_modulation.1", block.adaln)


def _swiglu(name: str, mlp: SwiGLU) -> Iterator[OfficialTensor]:
    for kind, tensor in (("weight", mlp.w12.weight), ("bias", mlp.w12.bias)):
        yield OfficialTensor(f"{name}.w12.{kind}", mlp.logical_w12(tensor), (2 * mlp.inner_size, *tensor.shape[1:]))
    yield _same(f"{name}.w3.weight", mlp.logical_w3())
    yield _same(f"{name}.w3.bias", mlp.w3.bias)


def _decoder_tensors(model: ViTDecoder) -> Iterator[OfficialTensor]:
    yield _constant("decoder_pos_embed", model.pos_embed[None])
    yield _same("trainable_cls_token", model.cls_token)
    yield from _linear("decoder_embed", model.embed)
    for index, block in enumerate(model.blocks):
        name = f"decoder_layers.{index}"
        yield from _linear(f"{name}.layernorm_before", block.norm1)
        yield from _separate_qkv(f"{name}.attention.attention", block.attn)
        yield from _linear(f"{name}.attention.output.dense", block.attn.proj)
        yield from _linear(f"{name}.layernorm_after", block.norm2)
        yield from _linear(f"{name}.intermediate.dense", block.mlp.fc1)
        yield from _linear(f"{name}.output.dense", block.mlp.fc2)
    yield from _linear("decoder_norm", model.norm)
    yield from _linear("decoder_pred", model.pred)


def _separate_qkv(name: str, attn: Attention) -> Iterator[OfficialTensor]:
    parts = zip(("query", "key", "value"), attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3), strict=True)
    for part, weight, bias in parts:
        yield _same(f"{name}.{part}.weight", weight)
        yield _same(f"{name}.{part}.bias", bias)


def _same(name: str, tensor: Tensor) -> OfficialTensor:
    return OfficialTensor(name, tensor, tuple(tensor.shape))


def _constant(name: str, tensor: Tensor) -> OfficialTensor:
    return OfficialTensor(name, tensor, tuple(tensor.shape), constant=True)


def _linear(name: str, layer: nn.Linear | nn.LayerNorm) -> Iterator[OfficialTensor]:
    yield _same(f"{name}.weight", layer.weight)
    yield _same(f"{name}.bias", layer.bias)


def _conv(name: str, layer: nn.Linear) -> Iterator[OfficialTensor]:
    yield OfficialTensor(f"{name}.weight", layer.weight, (*layer.weight.shape, 1, 1))
    yield _same(f"{name}.bias", layer.bias)


def _close(tensor: Tensor, entry: OfficialTensor) -> bool:
    return bool((tensor.to(entry.view) - entry.view).abs().max() <= CONSTANT_TOLERANCE)


def _dit_config(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> DiTConfig:
    dimensions = {key: _setting(config, key) for key in ("hidden_size", "depth", "num_heads")}
    backbone, ddt = dimensions, None
    if any(isinstance(value, Sequence) for value in dimensions.values()):
        if not all(isinstance(value, Sequence) and len(value) == 2 for value in dimensions.values()):
            raise ValueError(f"the official config mixes pairs (backbone, head) with single values: {dimensions}")
        backbone = {key: value[0] for key, value in dimensions.items()}
        ddt = DDTHeadConfig(**{key: value[1] for key, value in dimensions.items()})
    return DiTConfig(
        in_channels=_setting(config, "in_channels"),
        **backbone,
        z_channels=_setting(config, "z_channels"),
        grid_size=config["input_size"] if "input_size" in config else _grid_size(state_dict),
        qk_norm="dit_blocks.0.attn.q_norm.weight" in state_dict,
        class_dropout_prob=config.get("class_dropout_prob", DiTConfig.class_dropout_prob),
        ddt=ddt,
    )


def _grid_size(state_dict: Mapping[str, Tensor]) -> int:
    if "pos_embed" not in state_dict:
        raise ValueError("the config has no input_size and the state dict no pos_embed to read it from; give one")
    return math.isqrt(state_dict["pos_embed"].shape[1])


def decoder_config(config: Mapping[str, Any]) -> ViTDecoderConfig:
    """The decoder of an official config.json. ValueError names a setting that is missing or unknown here."""
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act={config['hidden_act']!r}: the RAE decoders use 'gelu', the only one known here")
    return ViTDecoderConfig(
        in_channels=_setting(config, "hidden_size"),
        hidden_size=_setting(config, "decoder_hidden_size"),
        depth=_setting(config, "decoder_num_hidden_layers"),
        num_heads=_setting(config, "decoder_num_attention_heads"),
        intermediate_size=_setting(config, "decoder_intermediate_size"),
        patch_size=_setting(config, "patch_size"),
        image_size=_setting(config, "image_size"),
        layer_norm_eps=config.get("layer_norm_eps", ViTDecoderConfig.layer_norm_eps),
        image_mean=tuple(config.get("image_mean", ViTDecoderConfig.image_mean)),
        image_std=tuple(config.get("image_std", ViTDecoderConfig.image_std)),
    )


def _setting(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise ValueError(f"the official config has no {key!r} (it has {', '.join(sorted(config))}); add it")
    return config[key]
