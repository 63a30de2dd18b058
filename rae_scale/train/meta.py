"""A stage's models on the meta device: shapes without weights."""

from __future__ import annotations

import warnings

import torch

from rae_scale.config import Config
from rae_scale.train.parts import Parts, build_parts, without_llm_weights


def build_parts_on_meta(config: Config) -> Parts:
    """`build_parts` on the meta device, which holds no weights. `config` as `without_weights` returns it."""
    with torch.device("meta"), warnings.catch_warnings():
        # The demo's encoder reads its weights even so, and torch says that they go nowhere.
        warnings.filterwarnings("ignore", message=".*to a meta parameter in the current model, which is a no-op")
        return build_parts(config, torch.device("meta"))


def without_weights(config: Config) -> Config:
    """`config` with the paths of weights removed: names give the shapes. The demo's encoder stays, its folder does."""
    config = without_llm_weights(config)
    update: dict[str, object] = {"decoder": config.model.decoder.model_copy(update={"path": None})}
    if config.model.encoder.name != "siglip-demo":
        update["encoder"] = config.model.encoder.model_copy(update={"path": None})
    return config.model_copy(update={"model": config.model.model_copy(update=update)})
