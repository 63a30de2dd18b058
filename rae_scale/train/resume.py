"""What of a run a checkpoint holds beside the engine, and whether it may be continued with a configuration: same model,
same data order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rae_scale.config import Config
from rae_scale.data.loader import data_fingerprint
from rae_scale.state import read_state

if TYPE_CHECKING:
    from rae_scale.train.loop import Run

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
    return {**settings, DATA: data_fingerprint(config.data)}


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


def progress(run: Run) -> dict[str, Any]:
    """What a checkpoint holds of a run beside the engine's state: all that decides about later steps."""
    return {
        "skipped": run.skipped,
        "batch": run.batch,
        "rollbacks": len(run.skipped_data.rollbacks),
        "spikes": run.spikes.state(),
    }


def set_progress(run: Run, state: Mapping[str, Any]) -> None:
    """Go on where the checkpoint with this `state` was made.

    Raises:
        ValueError: the run has left out data since its beginning, and the list of it is gone.
    """
    # A converted checkpoint has no past.
    made_after, listed = state.get("rollbacks", 0), len(run.skipped_data.rollbacks)
    if made_after > listed:
        raise ValueError(
            f"the checkpoint of step {state['step']} was made after {made_after} rollback(s), but skipped_data.json in "
            f"{run.folder} lists {listed}: which data come next cannot be told; put that file back, or start a new run "
            "with run.init_from"
        )
    run.step, run.skipped = state["step"], state["skipped"]
    run.spikes.load(state.get("spikes", {}))
