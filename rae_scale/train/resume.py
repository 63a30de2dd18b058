"""Whether a checkpoint may be continued with a configuration: same model, same data order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rae_scale.config import Config
from rae_scale.data.loader import data_fingerprint
from rae_scale.state import read_state

GENERATION_SETTINGS = ("model.name", "model.qk_norm", "model.ddt_num_heads", "model.llm.name", "model.llm.connector")
MODEL_SETTINGS = {
    "encoder": (),
    "decoder": ("model.decoder.name",),
    "pretrain": GENERATION_SETTINGS,
    "finetune": GENERATION_SETTINGS,
}
"""What shapes the module that a stage trains."""
SHARED_SETTINGS = ("stage", "model.encoder.name", "run.seed", "data.global_batch_size")
"""What every stage depends on; the last two say which samples a step holds."""
DATA = "data fingerprint"


def identity(config: Config) -> dict[str, Any]:
    """What must not change between the parts of one run. Paths in `config` must be resolved."""
    tree = config.model_dump(mode="json")
    settings = {key: read_dotted(tree, key) for key in SHARED_SETTINGS + MODEL_SETTINGS[config.stage]}
    return {**settings, DATA: data_fingerprint(config.data.sources)}


def read_dotted(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def check_identity(checkpoint: Path, current: dict[str, Any]) -> None:
    """Raise ValueError if `checkpoint` belongs to another model or data order than `current`."""
    saved = read_state(checkpoint).get("identity", {})
    changed = [
        f"{key} was {saved.get(key)!r}, is {value!r}" for key, value in current.items() if saved.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"{checkpoint} cannot be continued with these settings:\n  " + "\n  ".join(changed) + "\n"
            "A run keeps its model and its data. Put the settings back, or start a new run: another run.dir, with "
            "run.init_from if it shall begin from these weights"
        )
