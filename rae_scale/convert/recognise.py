"""Whose names a checkpoint has: from its config.json, or from the names where there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rae_scale.convert.decoder_files import DIFFUSERS_CLASS
from rae_scale.convert.official_config import MODEL_TYPE
from rae_scale.convert.source import Naming
from rae_scale.infer.published import MODEL_TYPE as OUR_MODEL_TYPE
from rae_scale.state.format import CheckpointError

MODEL_TYPES: Mapping[str, Naming] = {
    OUR_MODEL_TYPE: "native",
    MODEL_TYPE: "official",
    "qwen2": "llm",
    "vit_mae": "official-decoder",
}

# A beginning that only this naming has.
BEGINNINGS: tuple[tuple[str, Naming], ...] = (
    ("diff_head.", "official"),
    ("decoder.decoder_layers.", "diffusers-decoder"),
    ("decoder_layers.", "official-decoder"),
    ("conditioner.", "native"),
    ("dit.", "native"),
    ("blocks.", "native"),
    ("model.embed_tokens.", "llm"),
)


def naming_of(config: Mapping[str, Any], names: Iterable[str], what: str) -> Naming:
    """The naming of the checkpoint `what`, whose config.json is `config` (empty: it has none).

    Raises:
        CheckpointError: it is none that is known.
    """
    if config.get("_class_name") == DIFFUSERS_CLASS:
        return "diffusers-decoder"
    model_type = str(config.get("model_type") or "")
    if model_type in MODEL_TYPES:
        return MODEL_TYPES[model_type]
    if config and (model_type or "_class_name" in config):
        said = f"model_type={model_type!r}" if model_type else f"_class_name={config['_class_name']!r}"
        raise CheckpointError(
            f"{what}: config.json says {said}; known are model_type {', '.join(MODEL_TYPES)} and _class_name "
            f"{DIFFUSERS_CLASS}"
        )
    names = list(names)
    for beginning, naming in BEGINNINGS:
        if any(name.startswith(beginning) for name in names):
            return naming
    listed = ", ".join(names[:3]) or "none at all"
    raise CheckpointError(
        f"{what}: its tensors have the names of no format that is known here ({listed}, ...); strip any prefix that "
        "another program has added"
    )
