"""Everything that is optional about training: logs, progress, checkpoints, sample pictures. One file each."""

from rae_scale.train.callbacks.base import Callback, Metrics
from rae_scale.train.callbacks.checkpoint import Checkpoints
from rae_scale.train.callbacks.metrics_log import MetricsLog
from rae_scale.train.callbacks.progress import ProgressLine
from rae_scale.train.callbacks.samples import Samples
from rae_scale.train.callbacks.tensorboard import TensorBoard

__all__ = ["Callback", "Checkpoints", "Metrics", "MetricsLog", "ProgressLine", "Samples", "TensorBoard"]
