"""Training: one loop, four stages, callbacks."""

from rae_scale.train.dry_run import dry_run
from rae_scale.train.setup import train

__all__ = ["dry_run", "train"]
