"""Checkpoints that any engine writes and any engine reads, and the weights in them."""

from rae_scale.state.format import CheckpointError
from rae_scale.state.load import latest_checkpoint, load_checkpoint, read_state
from rae_scale.state.recover import intact_checkpoint
from rae_scale.state.reshard import reshard_checkpoint
from rae_scale.state.save import Retention, save_checkpoint
from rae_scale.state.saver import Saver
from rae_scale.state.weights import read_weights

__all__ = [
    "CheckpointError",
    "Retention",
    "Saver",
    "intact_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "read_state",
    "read_weights",
    "reshard_checkpoint",
    "save_checkpoint",
]
