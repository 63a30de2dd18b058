"""What the commands that use a trained model are given: a run, a checkpoint or an export; and the settings in it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import yaml

from rae_scale.config import Config, ConfigError, parse_config
from rae_scale.config.schema import EncoderConfig
from rae_scale.infer.published import MODEL_TYPE, is_published, model_type, published_config
from rae_scale.models.encoders import FrozenEncoder, build_encoder
from rae_scale.state import CheckpointError, latest_checkpoint, read_state
from rae_scale.state.format import CONFIG, MANIFEST, STATE

Weights = Literal["ema", "raw"] | None
"""Which weights of a checkpoint; None takes the moving average where the run kept one."""
STATE_KIND: dict[Weights, Literal["ema", "weight"] | None] = {"ema": "ema", "raw": "weight", None: None}

# Their sizes and pixel statistics are fixed, so decoding needs no copy of their weights.
PUBLISHED_ENCODERS = ("siglip2-so400m", "webssl-l")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint, exported or shared folder `path`, or the newest checkpoint of the run folder `path`.

    Raises:
        CheckpointError: it is none of these.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    newest = latest_checkpoint(path)
    if newest is None:
        check_kind(path)
        what = "has no complete checkpoint yet" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; give a run folder that has saved one, a checkpoint folder (step-...) or an exported folder"
        )
    return newest


def check_kind(folder: Path) -> None:
    """Raise CheckpointError, with what to do, if the folder's config.json says that it is none of ours."""
    found = model_type(folder)
    if found not in (None, MODEL_TYPE):
        raise CheckpointError(
            f"{folder} holds a model of type {found!r} (its config.json), not one of rae-scale's; if it is an official "
            f"Scale-RAE checkpoint, convert it once: `rae-scale convert {folder} OUT --to hf --decoder DECODER`"
        )


def stored_config(checkpoint: Path) -> Config:
    """The settings that `checkpoint` was trained with, as they were written (paths not resolved).

    Raises:
        ConfigError: they are missing, or this release does not know them.
    """
    if is_published(checkpoint):
        return published_config(checkpoint)
    check_kind(checkpoint)
    if (checkpoint / STATE).is_file():
        origin, tree = checkpoint / STATE, read_state(checkpoint).get("config")
    else:
        origin = checkpoint / CONFIG
        try:
            tree = yaml.safe_load(origin.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{origin}: not valid YAML: {error}") from None
    if not tree:
        raise ConfigError(f"{origin} holds no settings, so the model is unknown; use a checkpoint of `rae-scale train`")
    return parse_config(tree, origin=str(origin))


def decoding_encoder(cfg: EncoderConfig, device: torch.device) -> FrozenEncoder:
    """What decoding needs of the encoder: its sizes and pixel statistics, and its weights only if it decodes itself."""
    if cfg.name in PUBLISHED_ENCODERS:
        with torch.device("meta"):
            return build_encoder(EncoderConfig(name=cfg.name))
    return build_encoder(cfg).to(device)
