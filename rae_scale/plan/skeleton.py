"""The module that a configuration trains, without memory, without transformers and within a fraction of a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rae_scale.config import Config
from rae_scale.config.paths import resolve_paths
from rae_scale.data.tokenizer import IMAGE_END, IMAGE_START
from rae_scale.models.composite import build_scale_rae, group_of
from rae_scale.models.encoders.contrastive import ContrastiveModel, TextTowerConfig
from rae_scale.models.encoders.siglip_demo import SiglipDemoEncoder
from rae_scale.models.llm_zoo import named_llm
from rae_scale.models.zoo import build_decoder, dit_config
from rae_scale.plan.encoders import demo_config, encoder_shape
from rae_scale.plan.qwen2 import build_planned_llm
from rae_scale.train.parts import check_same_images, check_trained_encoder, load_stage_tokenizer

Skeleton = tuple[nn.Module, Callable[[str], str]]
"""A module on the meta device, and what tells the optimizer group of its parameters."""


class NoInitialization(TorchFunctionMode):
    """Leaves out what gives new parameters and buffers their values: tensors on the meta device have none, and working
    out that nothing happens took most of the time."""

    FILLS = (Tensor.normal_, Tensor.zero_, Tensor.fill_, Tensor.copy_)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.FILLS:
            return args[0]
        # Values that others follow from: a parameter's, before they are copied into it.
        if func is Tensor.clone:
            return torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device)
        if func in (Tensor.div, Tensor.__truediv__) and args[0].is_floating_point() and not isinstance(args[1], Tensor):
            return args[0]
        if func is torch.randn and "generator" not in kwargs:
            return torch.empty(*args, **kwargs)
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def planned_module(config: Config) -> Skeleton:
    """What `train.layout.build_module` gives: parameters of the same names, shapes and order, in modules that are
    called in the same order.

    Weights are not looked into: names give the shapes. So the tokenizer, and the demo's encoder, may still be missing;
    then the language model has the rows of its published vocabulary, and the encoder its default size.

    Raises:
        ValueError: settings name no model, or models that do not fit each other.
    """
    resolved = resolve_paths(config)
    with torch.device("meta"), NoInitialization():
        return BUILDERS.get(config.stage, generation)(resolved)


def generation(config: Config) -> Skeleton:
    model = config.model
    dit, vocab = dit_config(model), vocabulary(config)
    return build_scale_rae(model, dit.in_channels, dit.num_tokens, vocab, build_planned_llm), group_of


def decoder(config: Config) -> Skeleton:
    shape: Any = encoder_shape(config.model.encoder)
    module = build_decoder(config.model.decoder, shape.channels)
    check_same_images(config, module, shape)
    return module, lambda name: "decoder"


def encoder(config: Config) -> Skeleton:
    check_trained_encoder(config)
    rows = vocabulary(config) or named_llm(config.model.llm).vocab_size
    vision = SiglipDemoEncoder(demo_config(config.model.encoder.path))
    return ContrastiveModel(vision, TextTowerConfig(vocab_size=rows)), lambda name: "encoder"


BUILDERS: dict[str, Callable[[Config], Skeleton]] = {"decoder": decoder, "encoder": encoder}


def vocabulary(config: Config) -> int | None:
    """Rows of the embedding: the length of the tokenizer, if its folder is there, else None."""
    llm = config.model.llm
    path = llm.tokenizer or llm.path
    if path is None or not Path(path).is_dir():
        return None
    return tokens_of(Path(path)) or len(load_stage_tokenizer(config))


def tokens_of(folder: Path) -> int | None:
    """`len(load_tokenizer(folder))`, counted in the files that it reads; None if it is kept in an older form."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    tokens = {*content["model"]["vocab"], *(token["content"] for token in content["added_tokens"])}
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        added = json.loads(settings.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        tokens |= {token["content"] for token in added.values()}
    return len(tokens | {IMAGE_START, IMAGE_END})
